//! Registration: makes the guest's kernel know a patch's code by its address, as it knows that of a
//! module that it has loaded itself.
//!
//! The kernel looks an address up in two structures: the tree `mod_tree` (exceptions, unwinding,
//! names, kprobes) and the list `module_bug_list` (WARN and BUG). A patch's [`struct
//! module`](module_struct) is entered there in the pause that writes its jumps, and taken out in the
//! one that frees its code. It is not on the list `modules`: `lsmod` and `/proc/kallsyms` do not show
//! it, and nothing can find or unload it by its name.
//!
//! Both structures change under `module_mutex` only, which
//! [`preconditions`](crate::transition::preconditions) finds free before. This module plans; it
//! writes nothing itself.

pub mod bug_list;
pub mod kallsyms;
pub mod layout;
pub mod mod_tree;
pub mod module_struct;
pub mod rb_tree;
pub mod tables;
pub mod users;
pub mod words;

use introspect::{Gva, GvaRange, KernelMemory};

use crate::error::StepError;
use crate::memory::PatchMemory;
use crate::memory::write_batch::WriteBatch;
use crate::registration::layout::RegistrationLayout;
use crate::registration::mod_tree::TreeNode;
use crate::registration::module_struct::{ModuleMemory, UNUSED};
use crate::registration::users::{CodeUser, KprobeTable};

/// What of a patch is entered in the kernel's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    code: GvaRange,
    nodes: Vec<TreeNode>,
    bug_link: Gva,
    /// The address of its reference count, if modules have one.
    refcnt: Option<Gva>,
}

impl Registration {
    /// That of the `struct module` at `module`.
    #[must_use]
    pub fn new(layout: &RegistrationLayout, module: Gva, memory: &ModuleMemory) -> Registration {
        let fields = &layout.module;
        Registration {
            code: memory.text,
            nodes: module_struct::tree_nodes(&fields.memory, module, memory),
            bug_link: fields.bug_list.of(module),
            refcnt: fields.refcnt.map(|refcnt| refcnt.of(module)),
        }
    }

    /// What else in the guest uses the code, whose instructions are `text`.
    ///
    /// # Errors
    /// [`StepError::Failed`] when the guest's tables cannot be read.
    pub fn user(
        &self,
        memory: &KernelMemory<'_>,
        kprobes: Option<&KprobeTable>,
        text: &[u8],
    ) -> Result<Option<CodeUser>, StepError> {
        if let Some(refcnt) = self.refcnt {
            let count = memory.u32(refcnt)?;
            if count != UNUSED {
                return Ok(Some(CodeUser::Reference { count }));
            }
        }
        if let Some(kprobes) = kprobes
            && let Some(at) = kprobes.find(memory, self.code)?
        {
            return Ok(Some(CodeUser::Kprobe(at)));
        }
        let changed = users::first_change(memory, self.code.start, text)?;
        Ok(changed.map(CodeUser::Changed))
    }
}

/// Plans to enter the registrations in `add` in the kernel's tables and to take out those in
/// `remove`.
///
/// # Errors
/// [`StepError::Failed`] when the tables are not what the kernel's are.
pub fn plan(
    memory: &KernelMemory<'_>,
    layout: &RegistrationLayout,
    patch_memory: &PatchMemory,
    (add, remove): (&[&Registration], &[&Registration]),
    writes: &mut WriteBatch,
) -> Result<(), StepError> {
    if add.is_empty() && remove.is_empty() {
        return Ok(());
    }
    let nodes = |of: &[&Registration]| -> Vec<TreeNode> {
        of.iter().flat_map(|it| it.nodes.iter().copied()).collect()
    };
    let links = |of: &[&Registration]| of.iter().map(|it| it.bug_link).collect::<Vec<Gva>>();
    let (new, gone) = (nodes(add), nodes(remove));
    mod_tree::plan(memory, &layout.tree, patch_memory, (&new, &gone), writes)?;
    let (new, gone) = (links(add), links(remove));
    bug_list::plan(
        memory,
        &layout.bug_list,
        patch_memory,
        (&new, &gone),
        writes,
    )
}

#[cfg(test)]
mod tests;
