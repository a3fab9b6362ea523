//! Checks that share a guest, one after the other: a boot takes longer than most of them, and each leaves the guest as it found it.

use std::{env, time::Instant};

use anyhow::{Context, Result, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::introspection::core_dumps;
use crate::patching::{
    apply_revert, blocked_tasks, dry_run, generations, modes, patch_stack, refusals,
};
use crate::vmm::machine;
use crate::{ALL, Scenario};

/// Picks the checks whose names it is a part of; without it all run.
const CHECK: &str = "OUTPATCH_TEST_CHECK";

struct Check {
    name: &'static str,
    run: fn(&Fixture, &mut Guest, &str) -> Result<()>,
    /// The generations on which a plain run has it, and those on which it runs when all is asked for.
    plain: &'static [&'static str],
    more: &'static [&'static str],
}

/// In this order: the first wants a guest that nobody has patched yet (a core file does not tell what room is taken), and the last
/// leaves code behind.
static CHECKS: [Check; 9] = [
    Check {
        name: "dry_run::tells_what_apply_does",
        run: dry_run::tells_what_apply_does,
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
        name: "patch_stack::newest_serves",
        run: patch_stack::newest_serves,
        plain: &["7.3"],
        more: &["6.1", "6.12"],
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
];

pub fn scenarios() -> Vec<Scenario> {
    // What no check has in its name fails on each of them.
    let part = part();
    let known = CHECKS.iter().any(|check| check.name.contains(&part));
    ["5.10", "6.1", "6.12", "7.3"]
        .into_iter()
        .filter(|generation| !known || !wanted(generation).is_empty())
        .map(|generation| {
            Scenario::new(format!("shared_guest::{generation}"), move |fixture| {
                one_after_the_other(fixture, generation)
            })
        })
        .collect()
}

fn part() -> String {
    env::var(CHECK).unwrap_or_default()
}

/// The checks that were asked for on this generation.
fn wanted(generation: &str) -> Vec<&'static Check> {
    let part = part();
    let all = env::var_os(ALL).is_some() || !part.is_empty();
    let here = |check: &&Check| {
        check.plain.contains(&generation) || (all && check.more.contains(&generation))
    };
    let named = CHECKS.iter().filter(|check| check.name.contains(&part));
    named.filter(here).collect()
}

fn one_after_the_other(fixture: &Fixture, generation: &str) -> Result<()> {
    let wanted = wanted(generation);
    ensure!(!wanted.is_empty(), "no check has {:?} in its name", part());
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        for check in wanted {
            let begun = Instant::now();
            (check.run)(fixture, guest, generation).context(check.name)?;
            println!("{generation}: {} took {} s", check.name, begun.elapsed().as_secs());
            guest.sh("killall -q sleeper hammer; while grep -q '^sleep-' /proc/[0-9]*/comm; do sleep 0.1; done")?;
        }
        Ok(())
    })
}
