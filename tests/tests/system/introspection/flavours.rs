//! Kernels that are built for other machines than virtual ones, and for other needs: Debian's generic and rt flavours of every
//! generation. Tasks, stacks and symbols are the guest's own there too.
//!
//! Plain `cargo test` boots one of them; with `OUTPATCH_TEST_FLAVOURS=all` in the environment all ten have their scenario.

use std::env;

use anyhow::{Result, ensure};
use guests::kernel::{Flavour, Generation};

use crate::Scenario;
use crate::harness::fixture::Fixture;
use crate::introspection::{stacks, symbols};

/// What asks for all of them.
const VARIABLE: &str = "OUTPATCH_TEST_FLAVOURS";
/// What is booted in any case.
const ALWAYS: [(Generation, Flavour); 1] = [(Generation::V6_1, Flavour::Generic)];

/// The kernels whose scenarios are to run.
pub fn wanted() -> Vec<(Generation, Flavour)> {
    if env::var_os(VARIABLE).is_some_and(|value| value == "all") {
        every().collect()
    } else {
        ALWAYS.into()
    }
}

fn every() -> impl Iterator<Item = (Generation, Flavour)> {
    let flavours = [Flavour::Generic, Flavour::Rt];
    let of = move |generation| flavours.map(|flavour| (generation, flavour));
    Generation::ALL.into_iter().flat_map(of)
}

/// The name under which the fixture has a kernel.
pub fn key(generation: Generation, flavour: Flavour) -> String {
    match flavour {
        Flavour::Cloud => generation.to_string(),
        other => format!("{generation}-{other}"),
    }
}

fn name(key: &str) -> String {
    format!("flavours::read_as_the_guest_does_{key}")
}

/// All of them: which are to run, [`is_wanted`] says. In the bed there is no environment to ask.
pub fn scenarios() -> Vec<Scenario> {
    let scenario = |(generation, flavour)| {
        let key = key(generation, flavour);
        Scenario::new(name(&key), move |fixture| read(fixture, &key))
    };
    every().map(scenario).collect()
}

/// Whether the scenario is to run: others than these always are.
pub fn is_wanted(scenario: &Scenario) -> bool {
    let named = |(generation, flavour)| name(&key(generation, flavour)) == scenario.name;
    !every().any(named) || wanted().into_iter().any(named)
}

fn read(fixture: &Fixture, key: &str) -> Result<()> {
    fixture.with(fixture.boot(key, 2, "")?, |guest| {
        let log = guest.dmesg()?;
        let release = guest.sh("uname -r")?;
        ensure!(release == fixture.stock(key)?.release, "it runs {release}");
        let stacks = stacks::equal_in(guest)?;
        guest.expect_unharmed(&log)?;
        symbols::load_modules(guest)?;
        // Modules have something to say when they come.
        let log = guest.dmesg()?;
        let listing = symbols::same(guest)?;
        symbols::in_a_core(guest, &listing)?;
        let symbols = listing.lines();
        println!("{key}: {release}: {stacks} stacks and {symbols} symbols equal");
        guest.expect_unharmed(&log)
    })
}
