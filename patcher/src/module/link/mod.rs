//! Links a module for one guest: does from outside what `kernel/module/main.c: load_module` does up
//! to running the init function.
//!
//! This module knows the order of the steps: [`modversions`], [`symbols`], the sections and
//! relocations ([`linker`]), then the tables that change code, each in a file of its own
//! ([`return_thunks`], [`alternatives`], [`jump_labels`]) and those that the guest reads
//! ([`exception_table`], [`bug_table`]), and [`verify`] last. What is refused is
//! collected ([`refusals`]), as far as the rest can still be examined. [`resolve`] finds
//! the functions to be replaced; it is used before, when the patch is prepared.

pub mod alternatives;
pub mod bug_table;
pub mod exception_table;
pub mod image;
pub mod jump_labels;
pub mod linker;
pub mod modversions;
pub mod refusals;
pub mod resolve;
pub mod return_thunks;
pub mod symbols;
pub mod table;
pub mod verify;

use std::collections::HashSet;

use introspect::Gva;

use crate::module::KlpPatch;
use crate::module::error::LinkError;
use crate::module::file::LivepatchModule;
use crate::module::file::layout::{LoadAddresses, Sizes};
use crate::module::file::names::Names;
use crate::module::kernel::TargetKernel;
use crate::module::link::image::{Buffer, Image, ImageTable};
use crate::module::link::linker::{Linker, size};
use crate::module::link::modversions::Modversions;
use crate::module::link::refusals::Refusals;
use crate::module::link::symbols::Symbols;
use crate::x86::INT3;

/// Where a module is linked for that is only examined: the start of the kernel's area for modules
/// (`arch/x86/include/asm/pgtable_64_types.h: MODULES_VADDR`), from where all of the kernel is in
/// reach.
const EXAMINED_AT: Gva = Gva(0xffff_ffff_c000_0000);

/// Links `module`, whose `struct klp_patch` is `patch`, for the addresses `load_at` in the guest
/// kernel `target`.
///
/// The guest may run meanwhile: only what is constant in a kernel that is up is read.
///
/// # Errors
/// Every [`LinkError`] that was found; nothing was changed anywhere.
pub fn link<T: TargetKernel + ?Sized>(
    module: &LivepatchModule,
    patch: &KlpPatch,
    target: &T,
    load_at: LoadAddresses,
) -> Result<Image, Vec<LinkError>> {
    let one = |error: LinkError| vec![error];
    let layouts = target.layouts().map_err(|error| one(error.into()))?;
    let modversions = Modversions::check(module, target, &layouts).map_err(one)?;
    module.layout.check(&load_at).map_err(one)?;
    let mut refusals = Refusals::new(Names::new(&module.file));
    let symbols = Symbols::resolve(module, target, &modversions, &load_at, &mut refusals);
    let symbols = match symbols {
        Ok(symbols) => symbols,
        Err(error) => return Err(refusals.into_errors(Some(error))),
    };
    let mut linker = Linker {
        module,
        layouts: &layouts,
        patch,
        symbols,
        code: Buffer {
            base: load_at.code,
            bytes: vec![INT3; size(module.layout.sizes.code.len)],
        },
        rodata: Buffer {
            base: load_at.rodata,
            bytes: vec![0; size(module.layout.sizes.rodata.len)],
        },
        data: Buffer {
            base: load_at.data,
            bytes: vec![0; size(module.layout.sizes.data.len)],
        },
        extable: ImageTable::default(),
        bugs: ImageTable::default(),
        refusals,
        refused: HashSet::new(),
    };
    let done = apply_tables(&mut linker, target);
    if done.is_err() || linker.refusals.any() {
        return Err(linker.refusals.into_errors(done.err()));
    }
    let image = linker.finish().map_err(one)?;
    verify::check(&image).map_err(one)?;
    Ok(image)
}

/// Places the sections, and applies the tables that change them.
fn apply_tables<T: TargetKernel + ?Sized>(
    linker: &mut Linker<'_>,
    target: &T,
) -> Result<(), LinkError> {
    linker.load();
    linker.relocate()?;
    return_thunks::apply(linker, target)?;
    alternatives::apply(linker, target)?;
    jump_labels::apply(linker, target)?;
    exception_table::apply(linker)?;
    bug_table::apply(linker)
}

/// Checks that `module` was built for the kernel `target`: for any other, nothing else that could be
/// said of it would help.
///
/// # Errors
/// [`LinkError`].
pub fn check_version<T: TargetKernel + ?Sized>(
    module: &LivepatchModule,
    target: &T,
) -> Result<(), LinkError> {
    Modversions::check(module, target, &target.layouts()?).map(drop)
}

/// What [`link`] would refuse in a module that is refused for another reason already.
pub fn examine<T: TargetKernel + ?Sized>(
    module: &LivepatchModule,
    patch: &KlpPatch,
    target: &T,
) -> Vec<LinkError> {
    let Sizes { code, rodata, data } = module.layout.sizes;
    let after = |base: Gva, len: u64, align: u64| Gva(base.add(len).0.next_multiple_of(align));
    let rodata_at = after(EXAMINED_AT, code.len, rodata.align);
    let load_at = LoadAddresses {
        code: EXAMINED_AT,
        rodata: rodata_at,
        data: after(rodata_at, rodata.len, data.align),
    };
    link(module, patch, target, load_at)
        .err()
        .unwrap_or_default()
}
