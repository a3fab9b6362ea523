//! Checks that share a guest, one after the other: a boot takes longer than most of them, and each
//! leaves the guest as it found it.

use std::env;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::{Scenario, is_all_requested};
use crate::introspection::core_dumps;
use crate::patching::{
    apply_revert, blocked_tasks, dry_run, generations, modes, patch_memory, patch_stack, refusals,
    traced_sleepers,
};
use crate::vmm::machine;

/// Environment variable: only checks with this in their names run. Without it all run.
const CHECK: &str = "OUTPATCH_TEST_CHECK";

/// A check, and the generations that it is for.
struct Check {
    name: &'static str,
    run: fn(&Fixture, &mut Guest, &str) -> Result<()>,
    /// Generations on which a plain run has it.
    plain: &'static [&'static str],
    /// Generations on which it runs besides when every scenario is requested.
    more: &'static [&'static str],
}

/// All checks, in this order: the first needs a guest that has not been patched yet (a core file
/// does not show which memory patches have taken), the last but one leaves code in the guest, and the
/// last one taints it, as it has the guest load a livepatch.
static CHECKS: [Check; 11] = [
    Check {
        name: "dry_run::predicts_apply",
        run: dry_run::predicts_apply,
        plain: &["6.12"],
        more: &["6.1", "7.3"],
    },
    Check {
        name: "refusals::modules",
        run: refusals::modules,
        plain: &["6.1", "6.12"],
        more: &["7.3"],
    },
    Check {
        name: "generations::right_or_refused",
        run: generations::right_or_refused,
        plain: &["5.10", "7.3"],
        more: &[],
    },
    Check {
        name: "apply_revert::together",
        run: apply_revert::together,
        plain: &["6.1", "6.12", "7.3"],
        more: &[],
    },
    Check {
        name: "core_dumps::equal_the_paused_guest",
        run: core_dumps::equal_the_paused_guest,
        plain: &["6.12"],
        more: &["6.1", "7.3"],
    },
    Check {
        name: "machine::pause_loses_nothing",
        run: machine::pause_loses_nothing,
        plain: &["6.12"],
        more: &[],
    },
    Check {
        name: "patch_stack::newest_is_in_force",
        run: patch_stack::newest_is_in_force,
        plain: &["7.3"],
        more: &["6.1", "6.12"],
    },
    Check {
        name: "patch_memory::outlives_the_revert",
        run: patch_memory::outlives_the_revert,
        plain: &["6.12"],
        more: &["6.1", "7.3"],
    },
    Check {
        name: "blocked_tasks::sleepers_in_the_function",
        run: blocked_tasks::sleepers_in_the_function,
        plain: &["6.1", "7.3"],
        more: &["6.12"],
    },
    Check {
        name: "modes::one_pause_cancel_and_force",
        run: modes::one_pause_cancel_and_force,
        plain: &["6.1", "7.3"],
        more: &["6.12"],
    },
    Check {
        name: "traced_sleepers::do_not_block",
        run: traced_sleepers::do_not_block,
        plain: &["6.1", "7.3"],
        more: &["6.12"],
    },
];

pub fn scenarios() -> Vec<Scenario> {
    // A part that no check has in its name makes each scenario fail.
    let part = part();
    let is_known = CHECKS.iter().any(|check| check.name.contains(&part));
    ["5.10", "6.1", "6.12", "7.3"]
        .into_iter()
        .map(|generation| {
            let name = format!("shared_guest::{generation}");
            let run = move |fixture: &Fixture| run_wanted(fixture, generation);
            Scenario::new(name, run).only_if(!is_known || !wanted(generation).is_empty())
        })
        .collect()
}

fn part() -> String {
    env::var(CHECK).unwrap_or_default()
}

/// The checks that this run has on this generation.
fn wanted(generation: &str) -> Vec<&'static Check> {
    let part = part();
    let all = is_all_requested() || !part.is_empty();
    let is_for = |check: &&Check| {
        check.plain.contains(&generation) || (all && check.more.contains(&generation))
    };
    let named = CHECKS.iter().filter(|check| check.name.contains(&part));
    named.filter(is_for).collect()
}

fn run_wanted(fixture: &Fixture, generation: &str) -> Result<()> {
    let wanted = wanted(generation);
    ensure!(!wanted.is_empty(), "no check has {:?} in its name", part());
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        for check in wanted {
            let started = Instant::now();
            (check.run)(fixture, guest, generation).context(check.name)?;
            let seconds = started.elapsed().as_secs();
            println!("{generation}: {} took {seconds} s", check.name);
            guest.sh("killall -q sleeper hammer
while grep -q '^sleep-' /proc/[0-9]*/comm; do sleep 0.1; done")?;
        }
        Ok(())
    })
}
