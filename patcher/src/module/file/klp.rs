//! [`KlpPatch`]: `struct klp_patch`, `klp_object` and `klp_func`, read from a module's data and
//! relocations.
//!
//! The structures are in the module's data, with their pointers as relocations; their layout is the
//! target kernel's own, from its BTF. The patch is the object that the init function passes to
//! `klp_enable_patch` ([`init_exit`](crate::module::file::init_exit)). In what it accepts, it follows `kernel/livepatch/core.c: klp_init_patch`.

use std::collections::HashSet;

use object::elf;

use crate::module::error::ModuleError;
use crate::module::file::elf::{ElfFile, Place, Relocation, limit, text};
use crate::module::file::sections::Placement;

/// The most bytes of a name: `include/linux/kallsyms.h: KSYM_NAME_LEN` since 6.1; it was 128
/// before.
const MAX_SYMBOL_NAME: usize = 512;
/// The most functions in a patch: more than any cumulative patch has.
const MAX_FUNCTIONS: usize = 4096;
const MAX_OBJECTS: usize = 256;

/// Sizes and offsets of the livepatch structures in the target kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as the fields of the kernel's structures.
pub struct KlpLayout {
    pub patch_size: u64,
    pub patch_mod: u64,
    pub patch_objs: u64,
    pub patch_states: Option<u64>,
    pub patch_replace: u64,
    pub object_size: u64,
    pub object_name: u64,
    pub object_funcs: u64,
    /// Offsets of the callbacks from the start of `klp_object`, with their names.
    pub object_callbacks: [(u64, &'static str); 4],
    pub func_size: u64,
    pub func_old_name: u64,
    pub func_new_func: u64,
    pub func_old_sympos: u64,
}

impl KlpLayout {
    /// The fields that the author of a patch sets, and no others: for a kernel without
    /// `CONFIG_LIVEPATCH`, which declares no such structures. `guests/patches/klp_public.h`
    /// declares these.
    pub const PUBLIC: KlpLayout = KlpLayout {
        patch_size: 32,
        patch_mod: 0,
        patch_objs: 8,
        patch_states: Some(16),
        patch_replace: 24,
        object_size: 48,
        object_name: 0,
        object_funcs: 8,
        object_callbacks: [
            (16, "pre_patch"),
            (24, "post_patch"),
            (32, "pre_unpatch"),
            (40, "post_unpatch"),
        ],
        func_size: 24,
        func_old_name: 0,
        func_new_func: 8,
        func_old_sympos: 16,
    };
}

/// One function that a patch replaces (`struct klp_func`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatchFunction {
    /// Name of the function in the kernel.
    pub old_name: String,
    /// Its position among the functions of that name, in address order from 1; 0: it must be the
    /// only one.
    pub sympos: u64,
    /// Where in the module the new function is.
    pub(in crate::module) new: ModuleOffset,
}

/// What a module patches (`struct klp_patch`). All of it is in `vmlinux`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KlpPatch {
    /// Atomic replace: this patch takes the place of all earlier ones.
    pub replace: bool,
    /// The functions, in the module's order.
    pub functions: Vec<PatchFunction>,
    /// Where its structures are, with their lengths in bytes.
    pub(in crate::module) structures: Vec<(ModuleOffset, u64)>,
}

/// A section of the module and an offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::module) struct ModuleOffset {
    pub section: usize,
    pub offset: u64,
}

impl ModuleOffset {
    fn plus(self, bytes: u64) -> ModuleOffset {
        ModuleOffset {
            offset: self.offset.wrapping_add(bytes),
            ..self
        }
    }
}

/// Reads the patch of a module, which is at `at`. `refusals` gets what it needs that is not
/// supported.
pub(in crate::module) fn read(
    file: &ElfFile,
    placements: &[Placement],
    at: ModuleOffset,
    layout: &KlpLayout,
    refusals: &mut Vec<ModuleError>,
) -> Result<KlpPatch, ModuleError> {
    let reader = Reader { file, placements };
    if !reader.looks_like_patch(at, layout) {
        return Err(bad(
            "what its init function passes to klp_enable_patch is not this kernel's \
             struct klp_patch",
        ));
    }
    let states = match layout.patch_states {
        Some(offset) => reader.pointer(at.plus(offset))?,
        None => None,
    };
    if states.is_some() {
        refusals.push(ModuleError::States);
    }
    let replace = reader.bytes::<1>(at.plus(layout.patch_replace))? != [0];
    let objects = reader
        .pointer(at.plus(layout.patch_objs))?
        .ok_or_else(|| bad("klp_patch has no objects"))?;
    let mut functions = None;
    let mut other_objects = false;
    let mut structures = vec![(at, layout.patch_size)];
    for index in 0.. {
        limit("patched objects", index, MAX_OBJECTS)?;
        let object = objects.plus((index as u64).wrapping_mul(layout.object_size));
        let name = reader.pointer(object.plus(layout.object_name))?;
        let funcs = reader.pointer(object.plus(layout.object_funcs))?;
        // include/linux/livepatch.h: klp_for_each_object_static.
        if name.is_none() && funcs.is_none() {
            break;
        }
        refusals.extend(reader.callbacks(object, layout));
        if let Some(name) = name {
            refusals.push(ModuleError::ModuleTarget(reader.string(name)?));
            other_objects = true;
            continue;
        }
        let funcs = funcs.ok_or_else(|| bad("an object has no functions"))?;
        structures.push((object, layout.object_size));
        if functions
            .replace((funcs, reader.functions(funcs, layout)?))
            .is_some()
        {
            return Err(bad("two objects are both vmlinux"));
        }
    }
    let functions = match functions.filter(|(_, list): &(_, Vec<_>)| !list.is_empty()) {
        Some((array, functions)) => {
            let len = layout.func_size.saturating_mul(functions.len() as u64);
            structures.push((array, len));
            functions
        }
        None if other_objects => Vec::new(),
        None => return Err(bad("the patch has no functions")),
    };
    Ok(KlpPatch {
        replace,
        functions,
        structures,
    })
}

struct Reader<'a> {
    file: &'a ElfFile,
    placements: &'a [Placement],
}

impl Reader<'_> {
    fn looks_like_patch(&self, at: ModuleOffset, layout: &KlpLayout) -> bool {
        let fits = self
            .file
            .section(at.section)
            .is_some_and(|s| at.offset.saturating_add(layout.patch_size) <= s.size);
        let placed = self.placements.get(at.section) == Some(&Placement::Data);
        let module = self
            .relocation(at.plus(layout.patch_mod))
            .and_then(|r| self.file.symbol(r.symbol))
            .is_some_and(|s| s.name == "__this_module");
        fits && placed && module && matches!(self.pointer(at.plus(layout.patch_objs)), Ok(Some(_)))
    }

    fn functions(
        &self,
        array: ModuleOffset,
        layout: &KlpLayout,
    ) -> Result<Vec<PatchFunction>, ModuleError> {
        let mut out: Vec<PatchFunction> = Vec::new();
        let mut seen = HashSet::new();
        for index in 0u64.. {
            limit("patched functions", out.len(), MAX_FUNCTIONS)?;
            let func = array.plus(index.wrapping_mul(layout.func_size));
            let old_name = self.pointer(func.plus(layout.func_old_name))?;
            let new = self.pointer(func.plus(layout.func_new_func))?;
            let sympos = u64::from_le_bytes(self.bytes::<8>(func.plus(layout.func_old_sympos))?);
            // include/linux/livepatch.h: klp_for_each_func_static.
            let (old_name, new) = match (old_name, new) {
                (None, None) if sympos == 0 => break,
                (Some(old_name), Some(new)) => (self.string(old_name)?, new),
                _ => return Err(bad("a klp_func lacks its old_name or its new_func")),
            };
            if old_name.is_empty() {
                return Err(bad("a klp_func has an empty old_name"));
            }
            if self.placements.get(new.section) != Some(&Placement::Text) {
                return Err(bad(format!(
                    "the new function for {old_name} is not in code that is placed in the guest"
                )));
            }
            if !seen.insert((old_name.clone(), sympos)) {
                return Err(bad(format!("function {old_name} is patched twice")));
            }
            out.push(PatchFunction {
                old_name,
                sympos,
                new,
            });
        }
        Ok(out)
    }

    /// The refusal of an object that has callbacks.
    fn callbacks(&self, object: ModuleOffset, layout: &KlpLayout) -> Option<ModuleError> {
        let mut names = Vec::new();
        for (offset, name) in layout.object_callbacks {
            if let Some(callback) = self.relocation(object.plus(offset)) {
                let function = self
                    .defined(callback)
                    .and_then(|at| self.file.function_at(at.section, at.offset))
                    .map_or_else(String::new, |f| format!(" = {}", f.name));
                names.push(format!("{name}{function}"));
            }
        }
        (!names.is_empty()).then(|| ModuleError::Callbacks(names.join(", ")))
    }

    fn relocation(&self, at: ModuleOffset) -> Option<&Relocation> {
        self.file.section(at.section)?.relocation_at(at.offset)
    }

    /// What a relocation's symbol and addend refer to, if that is in the module.
    fn defined(&self, relocation: &Relocation) -> Option<ModuleOffset> {
        let symbol = self.file.symbol(relocation.symbol)?;
        match symbol.place {
            Place::Section(section) => Some(ModuleOffset {
                section,
                offset: symbol.value.wrapping_add_signed(relocation.addend),
            }),
            _ => None,
        }
    }

    /// Where the pointer field at `at` points to; `None` when it is null.
    fn pointer(&self, at: ModuleOffset) -> Result<Option<ModuleOffset>, ModuleError> {
        match self.relocation(at) {
            Some(r) if r.kind == elf::R_X86_64_64.0 => self
                .defined(r)
                .map(Some)
                .ok_or_else(|| bad("a pointer in it points outside the module")),
            Some(r) => Err(bad(format!(
                "a pointer in it has relocation type {}",
                r.kind
            ))),
            None => match self.bytes::<8>(at)? {
                [0, 0, 0, 0, 0, 0, 0, 0] => Ok(None),
                _ => Err(bad("a pointer in it has a value and no relocation")),
            },
        }
    }

    /// Bytes of a section as they will be loaded; those that the file does not have are zero.
    fn bytes<const N: usize>(&self, at: ModuleOffset) -> Result<[u8; N], ModuleError> {
        let section = self
            .file
            .section(at.section)
            .filter(|s| at.offset.saturating_add(N as u64) <= s.size)
            .ok_or_else(|| bad("it extends past the end of its section"))?;
        let mut out = [0; N];
        let from = usize::try_from(at.offset).unwrap_or(usize::MAX);
        if let Some(bytes) = self
            .file
            .data(section)
            .get(from..)
            .and_then(|rest| rest.get(..N))
        {
            out.copy_from_slice(bytes);
        }
        Ok(out)
    }

    fn string(&self, at: ModuleOffset) -> Result<String, ModuleError> {
        let section = self.file.section(at.section);
        section
            .and_then(|s| {
                let from = usize::try_from(at.offset).ok()?;
                text(self.file.data(s).get(from..)?, MAX_SYMBOL_NAME)
            })
            .ok_or_else(|| bad("a name in it is not a string"))
    }
}

fn bad(what: impl Into<String>) -> ModuleError {
    ModuleError::Klp(what.into())
}
