//! The `.ko` file: its ELF sections and symbols, its `.modinfo`, its `klp_patch`.
//!
//! They are read in the order [`elf`], [`modinfo`], [`sections`], [`layout`], [`init_exit`];
//! [`klp`] last, as it needs the layout of the guest kernel's structures. This module otherwise
//! knows nothing of a guest. Further formats (kpatch-build, klp-build) and module signatures belong
//! here, in files of their own beside [`klp`].

pub mod elf;
mod init_exit;
pub mod klp;
pub mod layout;
pub mod modinfo;
pub mod own_addresses;
pub mod sections;

use crate::module::KlpPatch;
use crate::module::error::ModuleError;
use crate::module::file::klp::{KlpLayout, ModuleOffset};
use crate::module::file::layout::{SectionLayout, Sizes};

/// A livepatch module as parsed from its file, not yet linked for a guest.
#[derive(Clone, Debug)]
pub struct LivepatchModule {
    pub(in crate::module) file: elf::ElfFile,
    pub(in crate::module) info: modinfo::Modinfo,
    pub(in crate::module) placements: Vec<sections::Placement>,
    pub(in crate::module) layout: SectionLayout,
    /// The patch that its init function enables.
    enabled: ModuleOffset,
}

/// Parses a livepatch module.
///
/// # Errors
/// [`ModuleError`] for a file that is not a livepatch module, or needs what is not supported.
pub fn parse(bytes: &[u8]) -> Result<LivepatchModule, ModuleError> {
    let file = elf::ElfFile::parse(bytes)?;
    if file.find(".gnu.linkonce.this_module").is_none() {
        return Err(ModuleError::WrongElf("it has no struct module"));
    }
    let info = modinfo::Modinfo::read(&file)?;
    let placements = sections::placements(&file)?;
    let layout = SectionLayout::new(&file.sections, &placements)?;
    let other = (file.sections.iter())
        .flat_map(|section| section.klp_relocations.keys())
        .find(|object| *object != "vmlinux");
    if let Some(object) = other {
        return Err(ModuleError::ModuleTarget(object.clone()));
    }
    let enabled = init_exit::enabled_patch(&file)?;
    init_exit::check_exit(&file)?;
    Ok(LivepatchModule {
        file,
        info,
        placements,
        layout,
        enabled,
    })
}

impl LivepatchModule {
    /// The module's name, as the guest's `lsmod` would show it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// How much memory it needs in a guest.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        self.layout.sizes
    }

    /// Its `klp_patch`, read with the layout of the target kernel.
    ///
    /// # Errors
    /// [`ModuleError`] when there is no `klp_patch` of that layout, or it needs what is not
    /// supported.
    pub fn patch(&self, layout: &KlpLayout) -> Result<KlpPatch, ModuleError> {
        klp::read(&self.file, &self.placements, self.enabled, layout)
    }
}
