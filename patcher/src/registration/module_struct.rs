//! `struct module` of a patch: what the kernel's tables lead to.
//!
//! Only what is asked by address is set: where the code is, and the tables for it
//! (`kernel/module/main.c: search_module_extables`, `lib/bug.c`, `arch/x86/kernel/unwind_orc.c`,
//! `kernel/module/kallsyms.c`). It is on no list but that of modules with WARN and BUG, has no
//! kobject, and cannot be unloaded.

use introspect::{Field, Gva, GvaRange};

use crate::error::PatchError;
use crate::module::Image;
use crate::registration::layout::{MemoryFields, ModuleFields, PartFields};
use crate::registration::mod_tree::TreeNode;
use crate::registration::tables::PlacedTables;
use crate::registration::words::Words;

/// `refcnt` of a module without users: `kernel/module/main.c: MODULE_REF_BASE`, and one for
/// outpatch, so that nothing takes it for one that can be unloaded.
pub const UNUSED: u32 = 2;

/// The memory of a patch, by its rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleMemory {
    /// Code, entry stubs included.
    pub text: GvaRange,
    /// Constants.
    pub rodata: GvaRange,
    /// Data.
    pub data: GvaRange,
}

/// The bytes of the `struct module` of `image`, whose memory and tables these are.
///
/// # Errors
/// [`PatchError`] if something does not fit its field.
pub fn bytes(
    fields: &ModuleFields,
    image: &Image,
    memory: &ModuleMemory,
    tables: &PlacedTables,
) -> Result<Vec<u8>, PatchError> {
    let mut words = Words::new(fields.size)?;
    words.set(fields.state, fields.registered)?;
    words.set_bytes(fields.name, image.name.as_bytes())?;
    for list in &fields.lists {
        let head = list.of(image.module).0.to_le_bytes();
        words.set_bytes(*list, &[head, head].concat())?;
    }
    if let Some(refcnt) = fields.refcnt {
        words.set(refcnt, UNUSED.into())?;
    }
    set_memory(&mut words, fields, image.module, memory)?;
    words.set(fields.extable, image.extable.at.0)?;
    words.set(fields.num_exentries, image.extable.count.into())?;
    words.set(fields.bug_table, image.bugs.at.0)?;
    words.set(fields.num_bugs, image.bugs.count.into())?;
    let [orc_count, orc_ips, orc] = fields.orc;
    words.set(orc_count, tables.orc_count)?;
    words.set(orc_ips, tables.orc_ips.0)?;
    words.set(orc, tables.orc.0)?;
    let kallsyms = &fields.core_kallsyms;
    words.set(fields.kallsyms, kallsyms.whole.of(image.module).0)?;
    words.set(kallsyms.symtab, tables.symtab.0)?;
    words.set(kallsyms.num_symtab, tables.symbols)?;
    words.set(kallsyms.strtab, tables.strtab.0)?;
    words.set(kallsyms.typetab, tables.typetab.0)?;
    Ok(words.into_bytes())
}

fn set_memory(
    words: &mut Words,
    fields: &ModuleFields,
    module: Gva,
    memory: &ModuleMemory,
) -> Result<(), PatchError> {
    for (part, range) in parts(&fields.memory, memory) {
        words.set(part.base, range.start.0)?;
        words.set(part.size, range.len())?;
        words.set(part.owner, module.0)?;
    }
    let sizes: &[Field] = match &fields.memory {
        MemoryFields::Layout { sizes, .. } => sizes,
        MemoryFields::Memories { .. } => &[],
    };
    for size in sizes {
        words.set(*size, memory.text.len())?;
    }
    Ok(())
}

/// The ranges that are not empty, with their fields. Where a module is one range, it is that of the
/// code: all that the kernel looks up by an address in data is whether a module has it.
fn parts(fields: &MemoryFields, memory: &ModuleMemory) -> Vec<(PartFields, GvaRange)> {
    let all = match fields {
        MemoryFields::Layout { part, .. } => vec![(*part, memory.text)],
        MemoryFields::Memories { text, rodata, data } => vec![
            (*text, memory.text),
            (*rodata, memory.rodata),
            (*data, memory.data),
        ],
    };
    all.into_iter()
        .filter(|(_, range)| !range.is_empty())
        .collect()
}

/// The nodes in `mod_tree` of the `struct module` at `module`.
#[must_use]
pub fn tree_nodes(fields: &MemoryFields, module: Gva, memory: &ModuleMemory) -> Vec<TreeNode> {
    let parts = parts(fields, memory).into_iter();
    parts
        .map(|(part, range)| TreeNode {
            at: part.node.of(module),
            range,
        })
        .collect()
}
