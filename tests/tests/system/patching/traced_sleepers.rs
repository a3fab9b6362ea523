//! Patches of a guest in which tasks sleep in functions whose return addresses a kretprobe and the
//! graph tracer have replaced: these tasks switch by their stacks, as in the kernel's own
//! livepatching, and those that sleep in the patched function are named with the frame.

use std::time::Duration;

use anyhow::{Result, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::introspection::traced_stacks;
use crate::patching::blocked_tasks::{BLOCKERS, end_of_transition, stays_blocked};

/// How long the guest's own livepatching may take: it looks at the tasks once a second.
const INSMOD_LIMIT: Duration = Duration::from_secs(60);

pub fn do_not_block(fixture: &Fixture, guest: &mut Guest, generation: &str) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;
    traced_stacks::put_to_sleep(guest)?;
    outpatch.ok(&[
        "apply",
        kernel.patch("livepatch-sample")?,
        "--timeout",
        "20",
    ])?;
    outpatch.ok(&["revert", "livepatch-sample", "--timeout", "20"])?;

    stays_blocked(guest, &outpatch, kernel.patch("pause")?)?;
    outpatch.ok(&["signal"])?;
    let completed = end_of_transition(&outpatch)?;
    for task in completed["tasks"].as_array().into_iter().flatten() {
        let is_blocker = BLOCKERS.contains(&task["comm"].as_str().unwrap_or_default());
        let signalled = task["signals"].as_u64().is_some_and(|signals| signals > 0);
        ensure!(is_blocker == signalled, "{task}");
    }
    outpatch.ok(&["revert", "pause", "--signal-after", "0"])?;
    guest.expect_unharmed(&log)?;

    // The guest's own livepatching goes through in the same situation.
    traced_stacks::kill(guest)?;
    traced_stacks::put_to_sleep(guest)?;
    guest.sh_within(
        "insmod /lib/patches/cmdline.ko; s=/sys/kernel/livepatch/cmdline; \
         until [ \"$(cat $s/transition)\" = 0 ]; do sleep 0.5; done; echo 0 > $s/enabled; \
         while [ -e $s ]; do sleep 0.5; done; rmmod cmdline",
        INSMOD_LIMIT,
    )?;
    Ok(())
}
