//! What a patch gives to the rest of the kernel: constants that are copied to user space, and
//! functions that are called after the patch was reverted.

use anyhow::{Result, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;

/// How often the patch with RCU callbacks is applied and reverted. Reused memory crashed the guest
/// in the second to fourth round.
const ROUNDS: u32 = 10;

/// After how many seconds the patch's timers have expired: they are set to 8.
const TIMERS_EXPIRE_IN: u32 = 12;

pub fn outlives_the_revert(fixture: &Fixture, guest: &mut Guest, generation: &str) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;

    // Hardened usercopy kills the reader if the constant is in the kernel's text.
    outpatch.ok(&["apply", kernel.patch("constant")?])?;
    let constant = guest.sh("cat /proc/self/oom_score_adj; echo status $?")?;
    ensure!(
        constant.contains("a constant of the patch") && constant.contains("status 0"),
        "the constant was not copied: {constant}"
    );
    outpatch.ok(&["revert", "constant"])?;
    let original = guest.sh("cat /proc/self/oom_score_adj")?;
    ensure!(
        original.trim() == "0",
        "the patch is still in force: {original}"
    );

    // Callbacks are pending at each revert. They run in the patch's code, which must still be there.
    for round in 0..ROUNDS {
        outpatch.ok(&["apply", kernel.patch("rcu-callback")?])?;
        let kept = outpatch.json(&["status", "rcu-callback"])?["kept_bytes"].as_u64();
        ensure!(
            kept.is_some_and(|kept| kept > 0),
            "round {round}: it keeps {kept:?} bytes"
        );
        let shown = guest.sh("for i in $(seq 50); do cat /proc/cmdline; done | sort | uniq -c")?;
        ensure!(shown.contains("50 freed after"), "round {round}: {shown}");
        outpatch.ok(&["revert", "rcu-callback"])?;
        // Another patch takes what is free.
        outpatch.ok(&["apply", kernel.patch("cmdline")?])?;
        outpatch.ok(&["revert", "cmdline"])?;
    }
    guest.sh("sleep 2")?;
    guest.expect_unharmed(&log)?;

    // Its timers expire after the revert, when other patches have used what memory is free.
    outpatch.ok(&["apply", kernel.patch("timer")?])?;
    let shown = guest.sh("cat /proc/cmdline")?;
    ensure!(shown == "timers started", "{shown}");
    outpatch.ok(&["revert", "timer"])?;
    for patch in ["constant", "rcu-callback", "cmdline"] {
        outpatch.ok(&["apply", kernel.patch(patch)?])?;
        outpatch.ok(&["revert", patch])?;
    }
    let log = guest.dmesg()?;
    guest.sh(&format!("sleep {TIMERS_EXPIRE_IN}"))?;
    let mut new = guest.dmesg_since(&log)?;
    new.sort();
    ensure!(
        new == [
            "timer in allocated memory expired",
            "timer in the patch's data expired",
        ],
        "{new:?}"
    );
    let log = guest.dmesg()?;
    guest.expect_unharmed(&log)
}
