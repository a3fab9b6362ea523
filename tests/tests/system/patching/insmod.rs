//! The `.ko` files that outpatch applies are ordinary livepatch modules: the guest's own `insmod`
//! loads them too.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::apply_revert::{PATCHES, Patch};

pub fn scenarios() -> Vec<Scenario> {
    ["6.1", "6.12"]
        .map(|generation| {
            let name = format!("insmod::same_files_{generation}");
            let run = move |fixture: &Fixture| same_files(fixture, generation);
            // A plain run loads one of the files in `traced_sleepers`.
            Scenario::new(name, run).extra_if(true)
        })
        .into()
}

/// A transition by the guest's own livepatching takes up to 26 s in an emulated guest.
const TRANSITION_LIMIT: Duration = Duration::from_secs(90);

fn same_files(fixture: &Fixture, generation: &str) -> Result<()> {
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        for patch in &PATCHES {
            patch.expect(guest, false)?;
            guest.sh(&format!("insmod /lib/patches/{}.ko", patch.file))?;
            settle(guest, patch)?;
            patch.expect(guest, true)?;
            // While the guest's own livepatch has the function patched, outpatch refuses to patch
            // it, names the reason, and changes nothing.
            let line = guest
                .outpatch()
                .clone()
                .refused(&["apply", fixture.kernel(generation)?.patch(patch.file)?])?;
            ensure!(
                line.contains(patch.name),
                "the refusal does not name the module: {line}"
            );
            println!("{generation}: patched by the guest itself: {line}");
            guest.sh(&format!(
                "echo 0 > /sys/kernel/livepatch/{}/enabled",
                patch.name
            ))?;
            settle(guest, patch)?;
            patch.expect(guest, false)?;
            guest.sh(&format!("rmmod {}", patch.name))?;
        }
        Ok(())
    })
}

fn settle(guest: &mut Guest, patch: &Patch) -> Result<()> {
    let deadline = Instant::now() + TRANSITION_LIMIT;
    let attribute = format!("/sys/kernel/livepatch/{}/transition", patch.name);
    while Instant::now() < deadline {
        // The folder of a patch is removed when it is disabled.
        if guest.sh(&format!("cat {attribute} 2>/dev/null || echo 0"))? == "0" {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    bail!("the guest's own transition of {} did not end", patch.name)
}
