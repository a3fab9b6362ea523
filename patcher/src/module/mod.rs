//! A livepatch module, from the unmodified `.ko` file to bytes that are ready for one guest.
//!
//! [`parse`] reads the file and refuses what cannot be taken; [`link()`] does from outside what the kernel's module loader does from
//! inside. Knows the formats and the kernel's rules; it writes nothing to a guest, and where the bytes go is given to it.

mod alternatives;
mod elf;
mod error;
mod exports;
mod guest;
mod image;
mod jumps;
mod klp;
mod link;
mod modinfo;
mod plan;
mod resolve;
mod returns;
mod sections;
mod symbols;
mod target;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod verify;
mod versions;

pub use error::{LinkError, ModuleError, TargetError};
pub use guest::GuestTarget;
pub use image::{Image, ImageSymbol, Import, LinkedFunction, OrcRecord};
pub use klp::{KlpLayout, Patch, PatchFunction};
pub use link::link;
pub use plan::{Bases, Sizes};
pub use resolve::{ResolvedFunction, resolve_function};
pub use target::{AltInstrLayout, Export, JumpEntryLayout, Layouts, ModversionLayout, Target};

/// A livepatch module as read from its file, not yet bound to a guest.
#[derive(Clone, Debug)]
pub struct LivepatchModule {
    file: elf::ElfFile,
    info: modinfo::Modinfo,
    fates: Vec<sections::Fate>,
    plan: plan::Plan,
}

/// Reads a livepatch module.
///
/// # Errors
/// [`ModuleError`] for a file that is none, or that needs what is not supported.
pub fn parse(bytes: &[u8]) -> Result<LivepatchModule, ModuleError> {
    let file = elf::ElfFile::parse(bytes)?;
    if file.find(".gnu.linkonce.this_module").is_none() {
        return Err(ModuleError::WrongElf("it has no struct module"));
    }
    let info = modinfo::Modinfo::read(&file)?;
    let fates = sections::fates(&file)?;
    let plan = plan::Plan::new(&file.sections, &fates)?;
    let other = (file.sections.iter())
        .flat_map(|section| section.late.keys())
        .find(|object| *object != "vmlinux");
    if let Some(object) = other {
        return Err(ModuleError::ModuleTarget(object.clone()));
    }
    Ok(LivepatchModule {
        file,
        info,
        fates,
        plan,
    })
}

impl LivepatchModule {
    /// The module's name, as the guest's `lsmod` would show it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// The kernel that it was built for.
    #[must_use]
    pub fn vermagic(&self) -> &str {
        &self.info.vermagic
    }

    /// How much room it needs in a guest.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        self.plan.sizes
    }

    /// What it patches, read with the layout of the target kernel.
    ///
    /// # Errors
    /// [`ModuleError`] when there is no `klp_patch` of that layout, or it asks for what is not supported.
    pub fn patch(&self, layout: &KlpLayout) -> Result<Patch, ModuleError> {
        klp::read(&self.file, &self.fates, layout)
    }
}
