//! Kernels that are configured for physical hardware, and for real time: Debian's generic and rt
//! flavours of every generation. Tasks, stacks and symbols equal the guest's own there too.
//!
//! A plain run boots none of them, as each takes two minutes on a slow machine; with
//! `OUTPATCH_TEST_ALL` it boots one, and with `OUTPATCH_TEST_FLAVOURS=all` all ten.

use std::env;

use anyhow::{Result, ensure};
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use guests::kernel::{Flavour, Generation};

use crate::harness::assets::MODULES;
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::introspection::{stacks, symbols};

/// Environment variable that requests all of them.
const VARIABLE: &str = "OUTPATCH_TEST_FLAVOURS";
/// The kernel that a run of all scenarios boots.
const ONE: (Generation, Flavour) = (Generation::V6_1, Flavour::Generic);

pub fn scenarios() -> Vec<Scenario> {
    let all = env::var_os(VARIABLE).is_some_and(|value| value == "all");
    let scenario = |(generation, flavour)| {
        let key = format!("{generation}-{flavour}");
        let name = format!("flavours::read_as_the_guest_does_{key}");
        let added = key.clone();
        Scenario::new(name, move |fixture| read(fixture, &key))
            .prepare(move |assets| {
                let kernel = PreparedKernel::prepare(KernelSpec {
                    generation,
                    flavour,
                    patches: &[],
                    modules: &MODULES,
                    boot: None,
                })?;
                assets.kernels.insert(added.clone(), kernel);
                Ok(())
            })
            .only_if(all || (generation, flavour) == ONE)
            .extra_if(!all)
    };
    let flavours = [Flavour::Generic, Flavour::Rt];
    let of = |generation| flavours.map(|flavour| (generation, flavour));
    Generation::ALL
        .into_iter()
        .flat_map(of)
        .map(scenario)
        .collect()
}

fn read(fixture: &Fixture, key: &str) -> Result<()> {
    fixture.with(fixture.boot(key, 2, "")?, |guest| {
        let log = guest.dmesg()?;
        let release = guest.sh("uname -r")?;
        ensure!(release == fixture.kernel(key)?.release, "it runs {release}");
        let stacks = stacks::equal_in(guest)?;
        guest.expect_unharmed(&log)?;
        symbols::load_modules(guest)?;
        // Modules write to the log when they are loaded.
        let log = guest.dmesg()?;
        let listing = symbols::same(guest)?;
        symbols::in_a_core(guest, &listing)?;
        let symbols = listing.lines();
        println!("{key}: {release}: {stacks} stacks and {symbols} symbols equal");
        guest.expect_unharmed(&log)
    })
}
