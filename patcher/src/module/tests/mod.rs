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
    all_errors(module, target, load_at).map_err(|errors| errors[0].clone())
}

/// As `apply` does it: every reason for which the module is refused, if it is.
fn all_errors(
    module: &LivepatchModule,
    target: &FakeKernel,
    load_at: LoadAddresses,
) -> Result<Image, Vec<LinkError>> {
    check_version(module, target).map_err(|error| vec![error])?;
    let mut refusals = module.refusals().to_vec();
    let patch = module.patch(&target.layouts.klp, &mut refusals);
    let patch = patch.unwrap_or_else(|error| {
        refusals.push(error);
        KlpPatch::default()
    });
    let mut errors: Vec<LinkError> = refusals.into_iter().map(LinkError::from).collect();
    if errors.is_empty() {
        return link(module, &patch, target, load_at);
    }
    errors.extend(examine(module, &patch, target));
    Err(errors)
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
