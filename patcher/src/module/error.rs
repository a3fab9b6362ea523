//! What can be wrong with a livepatch module: each error says what was found, where, and what to do.

use introspect::Gva;
use introspect::btf::BtfError;
use introspect::unwind::code_map::Overlap;
use introspect::unwind::orc_table::OrcTableError;

/// The file is not a livepatch module that can be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// More bytes than any module has.
    #[error("the module has {len} bytes; at most {max} are taken: is this a module?")]
    TooLarge {
        /// Size of the file.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A compressed module.
    #[error("the module is {0} compressed: unpack it first")]
    Compressed(&'static str),
    /// Some other kind of file.
    #[error("not an ELF file, so not a kernel module")]
    NotElf,
    /// An ELF file, but no x86-64 module.
    #[error("not an x86-64 kernel module: {0}")]
    WrongElf(&'static str),
    /// A table or a section reaches behind the end of the file, or a value in it makes no sense.
    #[error("the module file is truncated or damaged: {0}")]
    Damaged(String),
    /// More of something than any module has.
    #[error("the module has {count} {what}; at most {max} are taken")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A module, but not a livepatch.
    #[error(
        "not a livepatch: its .modinfo has no livepatch=Y (MODULE_INFO(livepatch, \"Y\") in the source)"
    )]
    NotLivepatch,
    /// A line of `.modinfo` that the kernel needs as well.
    #[error("the module's .modinfo has no usable {0}=")]
    Modinfo(&'static str),
    /// It needs other modules in the guest.
    #[error("the module depends on other modules ({0}): not supported yet")]
    Dependencies(String),
    /// Made by a tool whose format is not read yet.
    #[error("modules made by {0} are not supported yet: only a static struct klp_patch is read")]
    Format(&'static str),
    /// It has a section that the loader would have to act on, and this one cannot yet.
    #[error("section {section}{} is not supported yet: {why}", at(.function))]
    Section {
        /// Name of the section.
        section: String,
        /// The function that needs it, where one is known.
        function: Option<String>,
        /// What it is for.
        why: &'static str,
    },
    /// `struct klp_patch` and what hangs on it cannot be read.
    #[error("cannot read the module's klp_patch: {0}")]
    Klp(String),
    /// A patch of something else than the kernel itself.
    #[error("the patch changes functions of module {0}: module targets are not supported yet")]
    ModuleTarget(String),
    /// It has callbacks, which need process context in the guest.
    #[error("the patch has callbacks ({0}): not supported yet")]
    Callbacks(String),
    /// It has `klp_state`s.
    #[error("the patch has states (struct klp_state): not supported yet")]
    States,
    /// Two of its `klp_func`s name the same function.
    #[error("the module replaces function {0} twice")]
    Twice(String),
}

impl ModuleError {
    /// Whether the module may be right, and outpatch lacks what it needs.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            ModuleError::Dependencies(_)
                | ModuleError::Format(_)
                | ModuleError::Section { .. }
                | ModuleError::ModuleTarget(_)
                | ModuleError::Callbacks(_)
                | ModuleError::States
        )
    }
}

fn at(function: &Option<String>) -> String {
    function
        .as_ref()
        .map(|name| format!(" (for function {name})"))
        .unwrap_or_default()
}

/// What linking asked of the guest kernel could not be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The kernel has no such symbol.
    #[error("the guest kernel has no symbol {0}")]
    NoSymbol(&'static str),
    /// The kernel's type information lacks a type or a field.
    #[error("the guest kernel's type information: {0}")]
    Types(#[from] BtfError),
    /// The kernel's memory could not be read, or did not hold what it should.
    #[error("{what} at {at} cannot be read from the guest")]
    Memory {
        /// What was to be read.
        what: &'static str,
        /// Where.
        at: Gva,
    },
    /// A value in the guest that makes no sense.
    #[error("the guest's {0} makes no sense")]
    Invalid(&'static str),
}

/// The module cannot be linked into this guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The module itself.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The guest.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Built for another kernel.
    #[error(
        "the module's vermagic is `{module}`, the guest kernel's is `{kernel}`{}: build it against the guest's kernel",
        .symbol.as_ref().map(|s| format!(" and disagrees about {s}")).unwrap_or_default()
    )]
    Vermagic {
        /// The module's vermagic.
        module: String,
        /// The guest kernel's vermagic.
        kernel: String,
        /// The symbol whose version showed it, when the strings themselves do not decide.
        symbol: Option<String>,
    },
    /// The kernel has versions for its symbols and the module has none for this one.
    #[error(
        "the module has no version (CRC) for symbol {0}, and the guest kernel requires one: build it with the kernel's Module.symvers"
    )]
    NoVersion(String),
    /// `struct module` has another size than in the guest's kernel.
    #[error(
        "the module's struct module has {module} bytes, the guest kernel's {kernel}: build it against the guest's kernel"
    )]
    ModuleStruct {
        /// Size in the module.
        module: u64,
        /// Size in the kernel.
        kernel: u64,
    },
    /// An undefined symbol that the kernel does not export.
    #[error("unknown symbol {0}: the guest kernel does not export it")]
    UnknownSymbol(String),
    /// A GPL-only symbol, and a licence that is not compatible.
    #[error(
        "symbol {symbol} is for GPL-compatible modules only, and this one's license is `{license}`"
    )]
    GplOnly {
        /// The symbol.
        symbol: String,
        /// The module's license.
        license: String,
    },
    /// A symbol in a namespace that the module does not import.
    #[error("symbol {symbol} is in namespace {namespace}, which the module does not import")]
    Namespace {
        /// The symbol.
        symbol: String,
        /// Its namespace.
        namespace: String,
    },
    /// A `.klp.sym` symbol or a function that the kernel does not have.
    #[error("the guest kernel has no symbol {name}{}", nth(.sympos))]
    NotFound {
        /// Its name.
        name: String,
        /// Which of that name.
        sympos: u64,
    },
    /// A name with several symbols, and no position.
    #[error("the guest kernel has {count} symbols named {name}: set `old_sympos` to choose one")]
    Ambiguous {
        /// The name.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// Code or data refers to a part of the module that is not kept.
    #[error(
        "{section}+{offset:#x} refers to {to}, which is not kept in the guest: not supported yet"
    )]
    Dropped {
        /// Section with the reference.
        section: String,
        /// Where in it.
        offset: u64,
        /// What it refers to.
        to: String,
    },
    /// A relocation that cannot be applied.
    #[error("relocation at {section}+{offset:#x}: {why}")]
    Relocation {
        /// The section that it changes.
        section: String,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// The load_at given do not fit the module.
    #[error("invalid load address: {0}")]
    LoadAddress(&'static str),
    /// A static key whose later changes would not reach the patch.
    #[error(
        "{function} tests the static key {key}, which the guest may flip later without the patch seeing it: not supported yet"
    )]
    StaticKey {
        /// The function in the patch.
        function: String,
        /// The key.
        key: String,
    },
    /// The guest is still booting, and static keys may still change.
    #[error("the guest is still booting: static keys may still change; try again when it is up")]
    Booting,
    /// A table that the loader acts on holds something unexpected.
    #[error("{section}: {why}")]
    Table {
        /// Name of the table's section.
        section: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The module's ORC table makes no sense.
    #[error("its unwind data: {0}")]
    Orc(#[from] OrcTableError),
    /// The unwinder knows other code at the module's place.
    #[error("its unwind data: {0}")]
    Overlap(#[from] Overlap),
    /// The finished code is not what it should be.
    #[error("the linked code of {function} is wrong at {at}: {why}")]
    Code {
        /// The function.
        function: String,
        /// Where.
        at: Gva,
        /// What is wrong.
        why: &'static str,
    },
}

impl LinkError {
    /// The table `section` of the module holds something unexpected.
    pub(in crate::module) fn table(section: &'static str, why: impl Into<String>) -> LinkError {
        let why = why.into();
        LinkError::Table { section, why }
    }
}

fn nth(sympos: &u64) -> String {
    match sympos {
        0 => String::new(),
        n => format!(" number {n}"),
    }
}
