//! Whole modules through [`parse`] and [`link`](super::link()).

use super::*;
use crate::module::testing::*;

mod klp;
mod linked;
mod refused;

fn linked(ko: &Ko, target: &FakeKernel) -> Result<Image, LinkError> {
    linked_at(&parse(&ko.bytes())?, target, LOAD_AT)
}

fn linked_at(
    module: &LivepatchModule,
    target: &FakeKernel,
    load_at: LoadAddresses,
) -> Result<Image, LinkError> {
    let patch = module.patch(&target.layouts.klp)?;
    link(module, &patch, target, load_at)
}

fn error(ko: &Ko, target: &FakeKernel) -> LinkError {
    linked(ko, target).expect_err("should not link")
}

fn module_error(ko: &Ko) -> ModuleError {
    match error(ko, &FakeKernel::new()) {
        LinkError::Module(error) => error,
        other => panic!("{other:?}"),
    }
}
