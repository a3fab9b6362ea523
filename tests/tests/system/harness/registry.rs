//! The list of all scenarios. A new module of scenarios is added here, and nowhere else.

use crate::harness::scenario::Scenario;
use crate::harness::shared_guest;
use crate::introspection::{dead_guests, differential, flavours, symbols, traced_stacks};
use crate::patching::{
    apply_revert, fault_injection, guest_tools, insmod, no_livepatch, refusals, registration, soak,
    task_kinds, versus_klp,
};
use crate::vmm::{console, machine};

/// The modules, in the order in which their scenarios start.
const MODULES: [fn() -> Vec<Scenario>; 18] = [
    machine::scenarios,
    console::scenarios,
    symbols::scenarios,
    traced_stacks::scenarios,
    flavours::scenarios,
    refusals::scenarios,
    registration::scenarios,
    shared_guest::scenarios,
    insmod::scenarios,
    no_livepatch::scenarios,
    versus_klp::scenarios,
    fault_injection::scenarios,
    task_kinds::scenarios,
    soak::scenarios,
    guest_tools::scenarios,
    dead_guests::scenarios,
    apply_revert::scenarios,
    differential::scenarios,
];

/// All scenarios, whether this run wants them or not.
pub fn all() -> Vec<Scenario> {
    MODULES.iter().flat_map(|scenarios| scenarios()).collect()
}
