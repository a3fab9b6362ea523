//! The guest's ftrace: patches use the sites that it keeps at the entries of functions.

pub mod ops;
pub mod site;

use introspect::Field;
use introspect::btf::{Btf, BtfError};

/// Layout of ftrace's records (`struct dyn_ftrace`) and of their pages, and the bits in their
/// flags.
#[derive(Clone, Copy, Debug)]
pub struct FtraceLayout {
    page_next: Field,
    page_records: Field,
    page_index: Field,
    record_size: u64,
    record_ip: Field,
    record_flags: Field,
    /// `FTRACE_FL_DISABLED`: ftrace does not change the record's site.
    disabled: u64,
    /// Bits that stay set after the last user is gone, or that say nothing about users.
    harmless: u64,
    ipmodify: u64,
}

impl FtraceLayout {
    /// Resolves it from the kernel's type information.
    ///
    /// # Errors
    /// [`BtfError`] that names what the kernel lacks.
    pub fn new(btf: &Btf) -> Result<FtraceLayout, BtfError> {
        let bit = |name| btf.enum_value(name).map(i64::cast_unsigned);
        // Only newer kernels remember past users.
        let past_users = ["FTRACE_FL_TOUCHED", "FTRACE_FL_MODIFIED"];
        Ok(FtraceLayout {
            page_next: btf.field("ftrace_page.next")?,
            page_records: btf.field("ftrace_page.records")?,
            page_index: btf.field("ftrace_page.index")?,
            record_size: btf.size_of("dyn_ftrace")?,
            record_ip: btf.field("dyn_ftrace.ip")?,
            record_flags: btf.field("dyn_ftrace.flags")?,
            disabled: bit("FTRACE_FL_DISABLED")?,
            harmless: past_users
                .into_iter()
                .filter_map(|name| bit(name).ok())
                .sum(),
            ipmodify: bit("FTRACE_FL_IPMODIFY")?,
        })
    }
}
