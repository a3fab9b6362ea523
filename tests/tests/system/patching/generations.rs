//! The oldest and the newest kernel: they boot, and a patch works there or is refused with a
//! reason.

use anyhow::{Result, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::patching::apply_revert::PATCHES;

pub fn right_or_refused(fixture: &Fixture, guest: &mut Guest, generation: &str) -> Result<()> {
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;
    ensure!(
        guest.sh("uname -r")? == fixture.kernel(generation)?.release,
        "another kernel than requested"
    );
    ensure!(guest.sh("nproc")? == "2", "not all vCPUs are online");
    // A patch that was built for another kernel is refused in any case.
    let line = outpatch.refused(&["apply", fixture.kernel("6.12")?.patch("livepatch-sample")?])?;
    println!("{generation}: {line}");
    for patch in &PATCHES {
        let Ok(file) = fixture.kernel(generation)?.patch(patch.file) else {
            continue;
        };
        let reply = outpatch.call(&["apply", file])?;
        if reply.status == Some(0) {
            patch.expect(guest, true)?;
            outpatch.ok(&["revert", patch.name])?;
        } else {
            guests::drive::one_line_refusal(patch.name, &reply)?;
        }
        println!(
            "{generation}: {}: status {:?} {}",
            patch.name,
            reply.status,
            reply.stderr.trim()
        );
        patch.expect(guest, false)?;
    }
    guest.expect_unharmed(&log)
}
