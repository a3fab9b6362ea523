//! A function's ftrace site: the five bytes at its entry that the kernel keeps for ftrace, and what
//! uses them.
//!
//! A site is found by its ftrace record, at the function's first byte or after its ENDBR, and
//! verified by the bytes that are there. It can be taken only when nothing else uses it. This
//! module follows `kernel/trace/ftrace.c: ftrace_location, ftrace_verify_code`; it must not know
//! what will be written to the site.

use introspect::Gva;
use introspect::{Field, KernelMemory, ReadError};

use crate::ftrace::FtraceLayout;
use crate::guest_array;
use crate::x86::{CALL, INT3, JMP32, NOP5, NOP5_K8, SITE_LEN};

/// The five-byte NOPs that kernels put at unused sites: the current one, and that of older
/// processors (`arch/x86/include/asm/nops.h`: P6 and K8).
const SITE_NOPS: [[u8; SITE_LEN]; 2] = [NOP5, NOP5_K8];
/// Where a site can be: at the function's first byte, or after a four-byte ENDBR64 (or what sealing
/// left of it).
const OFFSETS: [u64; 2] = [0, 4];
/// The most pages of records: more than any kernel has. A list that is longer has a cycle.
const MAX_PAGES: u32 = 1 << 16;
/// The most records in one page group: more than any kernel has.
const MAX_RECORDS: u64 = 1 << 20;

/// A function's ftrace site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Address of the five bytes.
    pub at: Gva,
    /// The bytes of the unused site.
    pub nop: [u8; SITE_LEN],
    /// Address of the flags of its ftrace record.
    flags: Gva,
    flags_size: u64,
}

/// Why a function's ftrace site cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SiteError {
    /// ftrace has no record of a site in this function.
    #[error(
        "it has no ftrace site (notrace, noinstr or assembly), and only functions with one can be \
         replaced"
    )]
    None,
    /// Something in the guest uses the site.
    #[error("its ftrace site is in use by {0}; remove that first")]
    Used(String),
    /// The site holds bytes that no kernel writes there.
    #[error("its ftrace site holds {0} instead of the ftrace NOP")]
    Foreign(String),
    /// The site or its record changed after outpatch took it.
    #[error("something in the guest changed its ftrace site or its ftrace record")]
    Changed,
    /// The kernel's records could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The kernel's list of records has a cycle.
    #[error("the kernel's list of ftrace records does not end")]
    Endless,
}

impl Site {
    /// The unused site of the function at `entry`. `name_of` names code for messages.
    ///
    /// # Errors
    /// [`SiteError`], with the name of the user when the site is in use.
    pub fn find(
        memory: &KernelMemory<'_>,
        layout: &FtraceLayout,
        pages: Gva,
        entry: Gva,
        name_of: impl Fn(Gva) -> String,
    ) -> Result<Site, SiteError> {
        let (at, record) = find_record(memory, layout, pages, entry)?.ok_or(SiteError::None)?;
        let mut bytes = [0; SITE_LEN];
        memory.read(at, &mut bytes)?;
        let flags = memory.field(record, layout.record_flags)?;
        let nop = classify(layout, at, bytes, flags, name_of)?;
        Ok(Site {
            at,
            nop,
            flags: layout.record_flags.of(record),
            flags_size: layout.record_flags.size,
        })
    }

    /// The address after the site, where the original function continues.
    #[must_use]
    pub fn end(&self) -> Gva {
        self.at.add(SITE_LEN as u64)
    }

    /// Whether the site holds `bytes` now.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn holds(
        &self,
        memory: &KernelMemory<'_>,
        bytes: [u8; SITE_LEN],
    ) -> Result<bool, ReadError> {
        let mut now = [0; SITE_LEN];
        memory.read(self.at, &mut now)?;
        Ok(now == bytes)
    }

    /// Whether the site has users now according to its record, the disabled bit aside.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn has_users(
        &self,
        memory: &KernelMemory<'_>,
        layout: &FtraceLayout,
    ) -> Result<bool, ReadError> {
        Ok(self.flags(memory)? & !(layout.harmless | layout.disabled) != 0)
    }

    /// Whether ftrace does not change the site now (`FTRACE_FL_DISABLED`).
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn is_disabled(
        &self,
        memory: &KernelMemory<'_>,
        layout: &FtraceLayout,
    ) -> Result<bool, ReadError> {
        Ok(self.flags(memory)? & layout.disabled != 0)
    }

    /// The write, by address and bytes, after which ftrace does not change the site.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn disable(
        &self,
        memory: &KernelMemory<'_>,
        layout: &FtraceLayout,
    ) -> Result<(Gva, Vec<u8>), ReadError> {
        Ok(self.flags_write(self.flags(memory)? | layout.disabled))
    }

    /// The write, by address and bytes, after which ftrace manages the site again, with `users` as
    /// the users' part of the record's flags ([`FtraceOps::record_flags`]).
    ///
    /// [`FtraceOps::record_flags`]: crate::ftrace::ops::FtraceOps::record_flags
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn enable(
        &self,
        memory: &KernelMemory<'_>,
        layout: &FtraceLayout,
        users: u64,
    ) -> Result<(Gva, Vec<u8>), ReadError> {
        Ok(self.flags_write(self.flags(memory)? & layout.harmless | users))
    }

    fn flags_write(&self, flags: u64) -> (Gva, Vec<u8>) {
        let mut bytes = flags.to_le_bytes().to_vec();
        bytes.truncate(usize::try_from(self.flags_size).unwrap_or(bytes.len()));
        (self.flags, bytes)
    }

    fn flags(&self, memory: &KernelMemory<'_>) -> Result<u64, ReadError> {
        let field = Field {
            offset: 0,
            size: self.flags_size,
        };
        memory.field(self.flags, field)
    }
}

/// The NOP at an unused site, or what uses it.
fn classify(
    layout: &FtraceLayout,
    at: Gva,
    bytes: [u8; SITE_LEN],
    flags: u64,
    name_of: impl Fn(Gva) -> String,
) -> Result<[u8; SITE_LEN], SiteError> {
    let [opcode, a, b, c, d] = bytes;
    let target = || {
        let rel = i32::from_le_bytes([a, b, c, d]);
        name_of(at.add(SITE_LEN as u64).offset(i64::from(rel)))
    };
    match opcode {
        CALL if flags & layout.ipmodify != 0 => {
            return Err(SiteError::Used(format!(
                "a livepatch or kprobe of the guest's own (call to {})",
                target()
            )));
        }
        CALL => {
            return Err(SiteError::Used(format!(
                "ftrace, kprobes or BPF (call to {})",
                target()
            )));
        }
        INT3 => return Err(SiteError::Used("a kprobe (int3)".into())),
        JMP32 => return Err(SiteError::Used(format!("a jump to {}", target()))),
        _ => {}
    }
    if !SITE_NOPS.contains(&bytes) {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        return Err(SiteError::Foreign(hex.join(" ")));
    }
    if flags & layout.disabled != 0 {
        return Err(SiteError::Used(
            "something for which ftrace has disabled it (FTRACE_FL_DISABLED)".into(),
        ));
    }
    if flags & !layout.harmless != 0 {
        return Err(SiteError::Used(format!("ftrace (record flags {flags:#x})")));
    }
    Ok(bytes)
}

/// The site and the record of the function at `entry`, from the list of page groups of records,
/// each sorted by address.
fn find_record(
    memory: &KernelMemory<'_>,
    layout: &FtraceLayout,
    pages: Gva,
    entry: Gva,
) -> Result<Option<(Gva, Gva)>, SiteError> {
    let mut page = memory.pointer(pages)?;
    for _ in 0..MAX_PAGES {
        if page.is_null() {
            return Ok(None);
        }
        let records = Gva(memory.field(page, layout.page_records)?);
        let count = memory.field(page, layout.page_index)?.min(MAX_RECORDS);
        for offset in OFFSETS {
            let at = entry.add(offset);
            if let Some(record) = search_page(memory, layout, records, count, at)? {
                return Ok(Some((at, record)));
            }
        }
        page = Gva(memory.field(page, layout.page_next)?);
    }
    Err(SiteError::Endless)
}

/// The record of the site at `at` among `count` sorted ones.
fn search_page(
    memory: &KernelMemory<'_>,
    layout: &FtraceLayout,
    records: Gva,
    count: u64,
    at: Gva,
) -> Result<Option<Gva>, ReadError> {
    let record = |index: u64| records.add(index.wrapping_mul(layout.record_size));
    let found = guest_array::binary_search(count, |index| {
        let ip = Gva(memory.field(record(index), layout.record_ip)?);
        Ok::<_, ReadError>(ip.cmp(&at))
    })?;
    Ok(found.map(record))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::mock::Mock;

    const TEXT: Gva = Gva(0xffff_ffff_8100_0000);
    const DATA: Gva = Gva(0xffff_8880_0000_0000);
    const PAGES: Gva = DATA;
    const NOP: [u8; 5] = SITE_NOPS[0];
    const DISABLED: u32 = 1 << 25;
    const TOUCHED: u32 = 1 << 20;
    const IPMODIFY: u32 = 1 << 26;

    /// Sites at 0x100 (first byte), 0x204 (after ENDBR) and 0x304, the last in a second page group.
    fn machine() -> Mock {
        let mut machine = Mock::new(0x40000);
        machine.map(TEXT, Mock::FREE, 0x1);
        machine.map(DATA, Mock::FREE + 0x1000, 0x3);
        let pages = [(0x40u64, 0x80u64, 0x100u64, 2u32), (0x80, 0, 0x200, 1)];
        put(&mut machine, 0, &PAGES.add(0x40).0.to_le_bytes());
        for (at, next, records, count) in pages {
            let next = if next == 0 { 0 } else { DATA.add(next).0 };
            put(&mut machine, at, &next.to_le_bytes());
            put(&mut machine, at + 8, &DATA.add(records).0.to_le_bytes());
            put(&mut machine, at + 16, &count.to_le_bytes());
        }
        for (record, site) in [(0x100u64, 0x100u64), (0x110, 0x204), (0x200, 0x304)] {
            put(&mut machine, record, &TEXT.add(site).0.to_le_bytes());
            machine.put(Mock::FREE + site, &NOP);
        }
        machine
    }

    fn put(machine: &mut Mock, at: u64, bytes: &[u8]) {
        machine.put(Mock::FREE + 0x1000 + at, bytes);
    }

    fn layout() -> FtraceLayout {
        let field = |offset, size| Field { offset, size };
        FtraceLayout {
            page_next: field(0, 8),
            page_records: field(8, 8),
            page_index: field(16, 4),
            record_size: 16,
            record_ip: field(0, 8),
            record_flags: field(8, 8),
            disabled: DISABLED.into(),
            harmless: TOUCHED.into(),
            ipmodify: IPMODIFY.into(),
        }
    }

    fn find(machine: &Mock, entry: u64) -> Result<Site, SiteError> {
        Site::find(
            &machine.kernel_memory(),
            &layout(),
            PAGES,
            TEXT.add(entry),
            |at| format!("code at {at}"),
        )
    }

    #[test]
    fn finds_sites_at_both_offsets_and_in_later_page_groups() {
        let machine = machine();
        for (entry, site) in [(0x100, 0x100), (0x200, 0x204), (0x300, 0x304)] {
            let found = find(&machine, entry).unwrap();
            assert_eq!((found.at, found.nop), (TEXT.add(site), NOP));
            assert_eq!(found.end(), TEXT.add(site + 5));
        }
        assert_eq!(find(&machine, 0x180), Err(SiteError::None));
    }

    #[test]
    fn accepts_the_older_nop() {
        let mut machine = machine();
        machine.put(Mock::FREE + 0x100, &SITE_NOPS[1]);
        assert_eq!(find(&machine, 0x100).unwrap().nop, SITE_NOPS[1]);
    }

    #[test]
    fn names_the_user_of_a_site() {
        let cases: [(&[u8], u32, &str); 7] = [
            (
                &[0xe8, 0, 1, 0, 0],
                0x4000_0001,
                "ftrace, kprobes or BPF (call to code at 0xffffffff81000205)",
            ),
            (&[0xe8, 0, 0, 0, 0], IPMODIFY | 1, "livepatch"),
            (&[0xcc, 0x1f, 0x44, 0, 0], 0, "kprobe"),
            (&[0xe9, 0, 0, 0, 0], 0, "jump"),
            (&NOP, DISABLED, "FTRACE_FL_DISABLED"),
            (&NOP, 1, "ftrace (record flags 0x1)"),
            (&[0x55, 0x48, 0x89, 0xe5, 0x90], 0, "55 48 89 e5 90"),
        ];
        for (bytes, flags, word) in cases {
            let mut machine = machine();
            machine.put(Mock::FREE + 0x100, bytes);
            put(&mut machine, 0x108, &u64::from(flags).to_le_bytes());
            let error = find(&machine, 0x100).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let mut machine = machine();
        put(&mut machine, 0x108, &u64::from(TOUCHED).to_le_bytes());
        assert!(find(&machine, 0x100).is_ok());
    }

    #[test]
    fn a_disabled_record_counts_the_users_that_came_meanwhile() {
        let mut machine = machine();
        put(&mut machine, 0x108, &u64::from(TOUCHED).to_le_bytes());
        let site = find(&machine, 0x100).unwrap();
        let (at, bytes) = site.disable(&machine.kernel_memory(), &layout()).unwrap();
        assert_eq!(at, DATA.add(0x108));
        assert_eq!(bytes, u64::from(TOUCHED | DISABLED).to_le_bytes());
        put(&mut machine, 0x108, &bytes);
        let memory = machine.kernel_memory();
        assert!(site.is_disabled(&memory, &layout()).unwrap());
        assert!(!site.has_users(&memory, &layout()).unwrap());
        for users in [0, 2] {
            let (at, bytes) = site.enable(&memory, &layout(), users).unwrap();
            assert_eq!(at, DATA.add(0x108));
            assert_eq!(bytes, (u64::from(TOUCHED) | users).to_le_bytes());
        }
    }

    #[test]
    fn an_endless_list_is_an_error() {
        let mut machine = machine();
        put(&mut machine, 0x80, &DATA.add(0x40).0.to_le_bytes());
        assert_eq!(find(&machine, 0x180), Err(SiteError::Endless));
        put(&mut machine, 0x50, &u32::MAX.to_le_bytes());
        assert!(matches!(
            find(&machine, 0x180),
            Err(SiteError::Read(_) | SiteError::Endless)
        ));
    }
}
