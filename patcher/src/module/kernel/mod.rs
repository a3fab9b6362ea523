//! [`TargetKernel`]: what linking needs to know of the kernel that a module is linked for.
//!
//! [`GuestTarget`](guest::GuestTarget) reads it from a guest; tests have a fake kernel.

pub mod exports;
pub mod guest;

use introspect::Gva;

use crate::module::error::TargetError;
use crate::module::file::klp::KlpLayout;

/// A symbol that the kernel exports to modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The address of what it names.
    pub address: Gva,
    /// Whether only GPL-compatible modules may use it.
    pub gpl_only: bool,
    /// The namespace that a module must import to use it.
    pub namespace: Option<String>,
    /// Its version (CRC), in a kernel with `CONFIG_MODVERSIONS`.
    pub crc: Option<u32>,
}

/// Layouts of the tables and structures in a module, which are the target kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layouts {
    /// The livepatch structures.
    pub klp: KlpLayout,
    /// `sizeof(struct module)`.
    pub module_size: u64,
    /// `struct modversion_info`, if the kernel has versions.
    pub modversion: Option<ModversionLayout>,
    /// `struct alt_instr`.
    pub alt_instr: AltInstrLayout,
    /// `struct jump_entry`.
    pub jump_entry: JumpEntryLayout,
    /// `struct exception_table_entry`.
    pub exception: ExceptionLayout,
    /// `struct bug_entry`, in a kernel with relative pointers in it.
    pub bug: Option<BugLayout>,
    /// Offset of `enabled` in `struct static_key`.
    pub static_key_enabled: u64,
}

/// Size of `struct modversion_info` and offsets in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as the kernel's fields.
pub struct ModversionLayout {
    pub size: u64,
    pub crc: u64,
    pub name: u64,
}

/// Size of `struct alt_instr` and offsets in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as the kernel's fields.
pub struct AltInstrLayout {
    pub size: u64,
    pub instr_offset: u64,
    pub repl_offset: u64,
    /// A field of 16 bits.
    pub cpuid: u64,
    /// A field of 16 bits; in a kernel that has none, bit 15 of `cpuid` means *not*.
    pub flags: Option<u64>,
    pub instrlen: u64,
    pub replacementlen: u64,
}

/// Size of `struct jump_entry` and offsets in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as the kernel's fields.
pub struct JumpEntryLayout {
    pub size: u64,
    pub code: u64,
    pub target: u64,
    pub key: u64,
}

/// Size of `struct exception_table_entry` and offsets in it. All of its fields have 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as the kernel's fields.
pub struct ExceptionLayout {
    pub size: u64,
    pub insn: u64,
    pub fixup: u64,
    /// The distance to the handler's address, in a kernel that has no types of handlers.
    pub handler: Option<u64>,
}

/// Size of `struct bug_entry` and offsets in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as the kernel's fields.
pub struct BugLayout {
    pub size: u64,
    pub bug_addr_disp: u64,
    /// With `CONFIG_DEBUG_BUGVERBOSE`.
    pub file_disp: Option<u64>,
    /// In a kernel whose warnings have their format in the table.
    pub format_disp: Option<u64>,
}

/// The kernel that a module is linked for.
pub trait TargetKernel {
    /// The layouts of the tables and structures in a module.
    ///
    /// # Errors
    /// [`TargetError::Types`] when the kernel's type information lacks one.
    fn layouts(&self) -> Result<Layouts, TargetError>;

    /// The kernel's own vermagic string.
    ///
    /// # Errors
    /// [`TargetError`] when it is not found or cannot be read.
    fn vermagic(&self) -> Result<String, TargetError>;

    /// Every symbol of the kernel proper (not of modules) with this name, in address order.
    fn symbols(&self, name: &str) -> Vec<Gva>;

    /// The symbol at an address, with the offset in it, for messages.
    fn name_of(&self, address: Gva) -> Option<String>;

    /// The symbol that the kernel exports under this name.
    ///
    /// # Errors
    /// [`TargetError`] when the kernel's export tables cannot be read.
    fn export(&self, name: &str) -> Result<Option<Export>, TargetError>;

    /// `boot_cpu_data.x86_capability`: the feature words, then the bug words.
    ///
    /// # Errors
    /// [`TargetError`] when it cannot be read.
    fn capabilities(&self) -> Result<Vec<u32>, TargetError>;

    /// Whether the guest is up (`system_state` has reached `SYSTEM_RUNNING`): read-only-after-init
    /// data is final.
    ///
    /// # Errors
    /// [`TargetError`] when it cannot be read.
    fn is_up(&self) -> Result<bool, TargetError>;

    /// Reads the kernel's memory.
    ///
    /// # Errors
    /// [`TargetError::Memory`], which names `what`.
    fn read(&self, what: &'static str, at: Gva, buf: &mut [u8]) -> Result<(), TargetError>;

    /// The symbol of this name, if there is exactly one.
    fn symbol(&self, name: &str) -> Option<Gva> {
        match self.symbols(name).as_slice() {
            [one] => Some(*one),
            _ => None,
        }
    }
}
