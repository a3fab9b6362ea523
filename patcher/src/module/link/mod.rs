//! Links a module for one guest: does from outside what `kernel/module/main.c: load_module` does up
//! to running the init function.
//!
//! This module knows the order of the steps: [`modversions`], [`symbols`], the sections and
//! relocations ([`linker`]), then the tables that change code, each in a file of its own
//! ([`return_thunks`], [`alternatives`], [`jump_labels`]), and [`verify`] last. [`resolve`] finds
//! the functions to be replaced; it is used before, when the patch is prepared.

pub mod alternatives;
pub mod image;
pub mod jump_labels;
pub mod linker;
pub mod modversions;
pub mod resolve;
pub mod return_thunks;
pub mod symbols;
pub mod table;
pub mod verify;

use crate::module::KlpPatch;
use crate::module::error::LinkError;
use crate::module::file::LivepatchModule;
use crate::module::file::layout::LoadAddresses;
use crate::module::kernel::TargetKernel;
use crate::module::link::image::{Buffer, Image};
use crate::module::link::linker::{Linker, size};
use crate::module::link::modversions::Modversions;
use crate::module::link::symbols::Symbols;
use crate::x86::INT3;

/// Links `module`, whose `struct klp_patch` is `patch`, for the addresses `load_at` in the guest
/// kernel `target`.
///
/// The guest may run meanwhile: only what is constant in a kernel that is up is read.
///
/// # Errors
/// [`LinkError`]; nothing was changed anywhere.
pub fn link<T: TargetKernel + ?Sized>(
    module: &LivepatchModule,
    patch: &KlpPatch,
    target: &T,
    load_at: LoadAddresses,
) -> Result<Image, LinkError> {
    let layouts = target.layouts()?;
    let modversions = Modversions::check(module, target, &layouts)?;
    module.layout.check(&load_at)?;
    let symbols = Symbols::resolve(module, target, &modversions, &load_at)?;
    let mut linker = Linker {
        module,
        layouts: &layouts,
        patch,
        symbols,
        code: Buffer {
            base: load_at.code,
            bytes: vec![INT3; size(module.layout.sizes.code)],
        },
        data: Buffer {
            base: load_at.data,
            bytes: vec![0; size(module.layout.sizes.data)],
        },
    };
    linker.load();
    linker.relocate()?;
    return_thunks::apply(&mut linker, target)?;
    alternatives::apply(&mut linker, target)?;
    jump_labels::apply(&mut linker, target)?;
    let image = linker.finish()?;
    verify::check(&image)?;
    Ok(image)
}
