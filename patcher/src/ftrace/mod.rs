//! The guest's function tracer, whose sites at the entries of functions the patches use.

pub mod ops;
pub mod site;

use introspect::Field;
use introspect::btf::{Btf, BtfError};

/// Layout of ftrace's records, and the bits in them.
#[derive(Clone, Copy, Debug)]
pub struct FtraceLayout {
    page_next: Field,
    page_records: Field,
    page_index: Field,
    record_size: u64,
    record_ip: Field,
    record_flags: Field,
    /// `FTRACE_FL_DISABLED`: ftrace leaves the record's site alone.
    disabled: u64,
    /// Bits that stay when the last user has gone, or that say nothing of users.
    harmless: u64,
    ipmodify: u64,
}

impl FtraceLayout {
    /// From the kernel's own types.
    ///
    /// # Errors
    /// [`BtfError`] naming what the kernel lacks.
    pub fn new(btf: &Btf) -> Result<FtraceLayout, BtfError> {
        let bit = |name| btf.enum_value(name).map(i64::cast_unsigned);
        // Only newer kernels remember who was there.
        let memory = ["FTRACE_FL_TOUCHED", "FTRACE_FL_MODIFIED"];
        Ok(FtraceLayout {
            page_next: btf.field("ftrace_page.next")?,
            page_records: btf.field("ftrace_page.records")?,
            page_index: btf.field("ftrace_page.index")?,
            record_size: btf.size_of("dyn_ftrace")?,
            record_ip: btf.field("dyn_ftrace.ip")?,
            record_flags: btf.field("dyn_ftrace.flags")?,
            disabled: bit("FTRACE_FL_DISABLED")?,
            harmless: memory.into_iter().filter_map(|name| bit(name).ok()).sum(),
            ipmodify: bit("FTRACE_FL_IPMODIFY")?,
        })
    }
}
