//! The `.ko` file: its ELF sections and symbols, its `.modinfo`, its `klp_patch`.
//!
//! They are read in the order `compression`, [`elf`], [`modinfo`], [`sections`], [`layout`], [`init_exit`];
//! [`klp`] last, as it needs the layout of the guest kernel's structures. This module otherwise
//! knows nothing of a guest. Further formats (kpatch-build, klp-build) and module signatures belong
//! here, in files of their own beside [`klp`].

mod compression;
pub mod elf;
mod init_exit;
pub mod klp;
pub mod layout;
pub mod modinfo;
pub mod names;
pub mod own_addresses;
pub mod sections;

use std::collections::BTreeSet;

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
    /// The patch that its init function enables; `None` if that cannot be seen.
    enabled: Option<ModuleOffset>,
    /// Every reason that the file itself gives for which the module is refused.
    refusals: Vec<ModuleError>,
}

/// Parses a livepatch module. What it needs that is not supported is noted, so that all of it can be
/// told at once: [`LivepatchModule::refusals`].
///
/// # Errors
/// [`ModuleError`] for a file that is not a livepatch module.
pub fn parse(bytes: &[u8]) -> Result<LivepatchModule, ModuleError> {
    let file = elf::ElfFile::parse(&compression::unpack(bytes, elf::MAX_FILE)?)?;
    if file.find(sections::THIS_MODULE).is_none() {
        return Err(ModuleError::WrongElf("it has no struct module"));
    }
    let info = modinfo::Modinfo::read(&file)?;
    let mut refusals = Vec::new();
    if !info.depends.is_empty() {
        refusals.push(ModuleError::Dependencies(info.depends.clone()));
    }
    let placements = sections::placements(&file, &names::Names::new(&file), &mut refusals);
    let layout = SectionLayout::new(&file.sections, &placements)?;
    let objects: BTreeSet<&String> = (file.sections.iter())
        .flat_map(|section| section.klp_relocations.keys())
        .filter(|object| *object != "vmlinux")
        .collect();
    refusals.extend(objects.into_iter().cloned().map(ModuleError::ModuleTarget));
    let known_format = |refusal: &ModuleError| matches!(refusal, ModuleError::Format(_));
    let enabled = match refusals.iter().any(known_format) {
        // Its init function belongs to the format.
        true => None,
        false => init_exit::enabled_patch(&file, &mut refusals),
    };
    refusals.extend(init_exit::check_exit(&file).err());
    Ok(LivepatchModule {
        file,
        info,
        placements,
        layout,
        enabled,
        refusals,
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

    /// Every reason that the file itself gives for which the module is refused.
    #[must_use]
    pub fn refusals(&self) -> &[ModuleError] {
        &self.refusals
    }

    /// Its `klp_patch`, read with the layout of the target kernel. It is empty if what the init
    /// function enables is not known, which is one of [`refusals`](Self::refusals). `refusals` gets
    /// what the patch needs that is not supported.
    ///
    /// # Errors
    /// [`ModuleError`] when there is no `klp_patch` of that layout.
    pub fn patch(
        &self,
        layout: &KlpLayout,
        refusals: &mut Vec<ModuleError>,
    ) -> Result<KlpPatch, ModuleError> {
        let Some(at) = self.enabled else {
            return Ok(KlpPatch::default());
        };
        let init = |refusal: &ModuleError| matches!(refusal, ModuleError::Init(_));
        match klp::read(&self.file, &self.placements, at, layout, refusals) {
            // An init function that is not understood may have enabled something else.
            Err(_) if self.refusals.iter().any(init) => Ok(KlpPatch::default()),
            read => read,
        }
    }
}
