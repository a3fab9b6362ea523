//! Why a livepatch module is refused. Each message says what was found, where, and what to do.

use introspect::Gva;
use introspect::btf::BtfError;
use introspect::unwind::OrcTableError;
use introspect::unwind::RegionOverlap;

/// Why a file cannot be used as a livepatch module, whatever the guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// The file is larger than any module.
    #[error("the module has {len} bytes; at most {max} are accepted: is this a module?")]
    TooLarge {
        /// Size of the file, in bytes.
        len: usize,
        /// The limit, in bytes.
        max: usize,
    },
    /// The module is compressed, and cannot be unpacked.
    #[error("the module is compressed with {format} and cannot be unpacked: {why}")]
    Compression {
        /// The format.
        format: &'static str,
        /// What the decoder says.
        why: String,
    },
    /// The file is not an ELF file.
    #[error("not an ELF file, so not a kernel module")]
    NotElf,
    /// The file is an ELF file, but no x86-64 module.
    #[error("not an x86-64 kernel module: {0}")]
    WrongElf(&'static str),
    /// The module's symbol table was removed.
    #[error(
        "the module has no symbol table, as after strip -s: give the module as it was built, or \
         use strip --strip-debug"
    )]
    Stripped,
    /// A table or a section extends past the end of the file, or a value in it is invalid.
    #[error("the module file is truncated or damaged: {0}")]
    Damaged(String),
    /// The module has more of something than any real one.
    #[error("the module has {count} {what}; at most {max} are accepted")]
    TooMany {
        /// What it has too many of, in the plural.
        what: &'static str,
        /// How many it has.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// The module is not a livepatch.
    #[error(
        "not a livepatch: its .modinfo has no livepatch=Y \
         (MODULE_INFO(livepatch, \"Y\") in the source)"
    )]
    NotLivepatch,
    /// `.modinfo` lacks this key, which the kernel's loader requires as well, or its value is
    /// invalid.
    #[error("the module's .modinfo has no usable {0}=")]
    Modinfo(&'static str),
    /// The module needs other modules in the guest.
    #[error("the module depends on other modules ({0}): not supported yet")]
    Dependencies(String),
    /// The module was built by a tool whose format is not supported yet.
    #[error("modules made by {0} are not supported yet: only a static struct klp_patch is read")]
    Format(&'static str),
    /// The module has a section that its loader must act on, which is not supported yet.
    #[error("section {section}{} is not supported yet: {why}", for_functions(.functions))]
    Section {
        /// Name of the section.
        section: String,
        /// The functions that need it, as far as they are known.
        functions: Vec<String>,
        /// What the section is for.
        why: &'static str,
    },
    /// `struct klp_patch`, or a structure that it points to, cannot be read.
    #[error("cannot read the module's klp_patch: {0}")]
    Klp(String),
    /// The patch changes a module, not the kernel itself.
    #[error("the patch changes functions of module {0}: module targets are not supported yet")]
    ModuleTarget(String),
    /// The patch has callbacks, which need process context in the guest.
    #[error("the patch has callbacks ({0}): not supported yet")]
    Callbacks(String),
    /// The patch has `klp_state`s.
    #[error("the patch has states (struct klp_state): not supported yet")]
    States,
    /// Its init function does more than outpatch does in its place.
    #[error(
        "the module's init function would not run: {0}; only klp_enable_patch of a static patch, \
         whose result it returns, is supported"
    )]
    Init(String),
    /// Its exit function does something, and outpatch does not run it.
    #[error("the module's exit function would not run: {0}; only an empty one is supported")]
    Exit(String),
    /// Two `klp_func`s of the patch replace the same function.
    #[error("the module replaces function {0} twice")]
    Twice(String),
}

impl ModuleError {
    /// Whether the module may be valid, and outpatch lacks what it needs.
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
                | ModuleError::Init(_)
                | ModuleError::Exit(_)
                | ModuleError::TooMany { .. }
        )
    }
}

/// The first functions of a list, for a message.
fn for_functions(functions: &[String]) -> String {
    const SHOWN: usize = 3;
    let (shown, rest) = functions.split_at(functions.len().min(SHOWN));
    match (shown, rest.len()) {
        ([], _) => String::new(),
        ([one], _) => format!(" (for function {one})"),
        (shown, 0) => format!(" (for functions {})", shown.join(", ")),
        (shown, more) => format!(" (for functions {} and {more} more)", shown.join(", ")),
    }
}

/// Why the guest's kernel does not have, or does not show, what linking needs of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The kernel has no such symbol.
    #[error("the guest kernel has no symbol {0}")]
    NoSymbol(&'static str),
    /// The kernel's type information lacks a type or a field.
    #[error("the guest kernel's type information: {0}")]
    Types(#[from] BtfError),
    /// The kernel's memory could not be read.
    #[error("{what} at {at} cannot be read from the guest")]
    Memory {
        /// What was to be read.
        what: &'static str,
        /// Its address.
        at: Gva,
    },
    /// A value in the guest is one that no kernel has.
    #[error("the guest's {0} is invalid")]
    Invalid(&'static str),
}

/// Why a module cannot be linked into this guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The module itself cannot be used.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The guest's kernel cannot be read.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The module was built for another kernel.
    #[error(
        "{}: build it against the guest's kernel",
        other_version(.module, .kernel, .symbol.as_deref())
    )]
    Vermagic {
        /// The module's vermagic.
        module: String,
        /// The guest kernel's vermagic.
        kernel: String,
        /// The symbol whose version differs, if the strings themselves do not decide.
        symbol: Option<String>,
    },
    /// The kernel has versions for its symbols, and the module has none for this one.
    #[error(
        "the module has no version (CRC) for symbol {0}, and the guest kernel requires \
         one: build it with the kernel's Module.symvers"
    )]
    NoVersion(String),
    /// `struct module` has another size than in the guest's kernel.
    #[error(
        "the module's struct module has {module} bytes, the guest kernel's {kernel}: \
         build it against the guest's kernel"
    )]
    ModuleStruct {
        /// Size in the module, in bytes.
        module: u64,
        /// Size in the kernel, in bytes.
        kernel: u64,
    },
    /// The module uses a symbol that the kernel does not export.
    #[error("unknown symbol {0}: the guest kernel does not export it")]
    UnknownSymbol(String),
    /// The module uses a GPL-only symbol, and its license is not compatible.
    #[error(
        "symbol {symbol} is for GPL-compatible modules only, and this one's license is `{license}`"
    )]
    GplOnly {
        /// Name of the symbol.
        symbol: String,
        /// The module's license.
        license: String,
    },
    /// The module uses a symbol of a namespace that it does not import.
    #[error("symbol {symbol} is in namespace {namespace}, which the module does not import")]
    Namespace {
        /// Name of the symbol.
        symbol: String,
        /// The symbol's namespace.
        namespace: String,
    },
    /// The kernel has no such function, or no symbol for a `.klp.sym` one.
    #[error("the guest kernel has no symbol {name}{}", nth(.sympos))]
    NotFound {
        /// Name of the symbol.
        name: String,
        /// Its position among the symbols of that name, from 1; 0: it must be the only one.
        sympos: u64,
    },
    /// The kernel has several symbols of this name, and the module gives no position.
    #[error(
        "the guest kernel has {count} symbols named {name}: give the position of the one that is \
         meant (old_sympos, or the number in .klp.sym)"
    )]
    Ambiguous {
        /// The name that is not unique.
        name: String,
        /// How many symbols have it.
        count: usize,
    },
    /// Code or data refers to a part of the module that is not placed in the guest.
    #[error("{at} refers to {to}, which {}: not supported yet", dropped(.section))]
    Dropped {
        /// The place of the reference: an offset in a function, an object or a section.
        at: String,
        /// The symbol or section that it refers to.
        to: String,
        /// Name of the section that it is in.
        section: Box<str>,
    },
    /// A livepatch symbol is code or data of the kernel's that is freed after boot.
    #[error(
        "symbol {0} is init code or data of the guest kernel (__init, __initdata), which was freed \
         after boot"
    )]
    InitSymbol(String),
    /// A symbol that the module uses cannot be had.
    #[error("{source} (used by {user})")]
    Used {
        /// A function or an object that uses it.
        user: String,
        /// Why not.
        source: Box<LinkError>,
    },
    /// A relocation cannot be applied.
    #[error("relocation at {at}: {why}")]
    Relocation {
        /// The place that it changes: an offset in a function, an object or a section.
        at: String,
        /// What is wrong with it.
        why: String,
    },
    /// The load addresses do not fit the module.
    #[error("invalid load address: {0}")]
    LoadAddress(&'static str),
    /// The patch tests a static key whose later changes would not reach it.
    #[error(
        "{function} tests the static key {key}, which the guest may change later \
         without effect on the patch: not supported yet"
    )]
    StaticKey {
        /// The function in the patch.
        function: String,
        /// Name of the key.
        key: String,
    },
    /// The guest is still booting, so that static keys may still change.
    #[error("the guest is still booting: static keys may still change; try again when it is up")]
    Booting,
    /// A table of the module that its loader acts on holds something unexpected.
    #[error("{section}: {why}")]
    Table {
        /// Name of the table's section.
        section: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The module's ORC table is invalid.
    #[error("the module's unwind data: {0}")]
    Orc(#[from] OrcTableError),
    /// The unwinder knows other code at the module's addresses.
    #[error("the module's unwind data: {0}")]
    Overlap(#[from] RegionOverlap),
    /// The linked code failed its last check.
    #[error("the linked code of {function} is wrong at {at}: {why}")]
    Code {
        /// Name of the patch's function.
        function: String,
        /// Address of the wrong instruction.
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

/// What a section is of which nothing is placed in the guest.
fn dropped(section: &str) -> String {
    let is = match section {
        ".init.text" => "is init code, which the kernel frees once a module is loaded",
        ".init.data" | ".init.rodata" => {
            "is init data, which the kernel frees once a module is loaded"
        }
        ".exit.text" => "is exit code, which is not placed in the guest",
        ".exit.data" => "is exit data, which is not placed in the guest",
        "" => "is not placed in the guest",
        other => return format!("is in section {other}, which is not placed in the guest"),
    };
    is.to_owned()
}

fn other_version(module: &str, kernel: &str, symbol: Option<&str>) -> String {
    let vermagics =
        format!("the module's vermagic is `{module}`, the guest kernel's is `{kernel}`");
    match symbol {
        None => vermagics,
        Some(symbol) => format!(
            "the module was built with another version (CRC) of symbol {symbol} than the guest \
             kernel has ({vermagics})"
        ),
    }
}

fn nth(sympos: &u64) -> String {
    match sympos {
        0 => String::new(),
        n => format!(" number {n}"),
    }
}
