//! Several patches of one function, reverted in any order, and a patch that replaces all others.

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Outpatch};

use crate::harness::fixture::Fixture;
use crate::patching::apply_revert::PATCHES;

/// The patches of `/proc/cmdline` by name, and what it contains with each and without.
const SAMPLE: (&str, &str) = ("livepatch_sample", "this has been live patched");
const CMDLINE: (&str, &str) = ("cmdline", "this guest was patched from outside");
const ORIGINAL: &str = "console=ttyS0";

pub fn newest_is_in_force(fixture: &Fixture, guest: &mut Guest, generation: &str) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;
    guest.sh("sleeper 10 & hammer 4 /tmp/hammer & sleep 1")?;
    let apply = |file: &str| outpatch.ok(&["apply", kernel.patch(file)?, "--signal-after", "0"]);
    let revert = |name: &str| outpatch.ok(&["revert", name, "--signal-after", "0"]);
    let expect = |guest: &mut Guest, what: &str| {
        let line = guest.sh("cat /proc/cmdline")?;
        ensure!(line.contains(what), "{what:?} was expected: {line}");
        Ok(())
    };

    // The older patch is reverted first, then the newer one.
    apply("livepatch-sample")?;
    expect(guest, SAMPLE.1)?;
    apply("cmdline")?;
    expect(guest, CMDLINE.1)?;
    revert(SAMPLE.0)?;
    expect(guest, CMDLINE.1)?;
    revert(CMDLINE.0)?;
    expect(guest, ORIGINAL)?;

    // The newer patch is reverted first, and applied again.
    apply("livepatch-sample")?;
    apply("cmdline")?;
    revert(CMDLINE.0)?;
    expect(guest, SAMPLE.1)?;
    apply("cmdline")?;
    expect(guest, CMDLINE.1)?;

    // With sleepers in the function of another patch, and a patch of a system call that is called
    // all the time: one patch replaces them all.
    apply("getpid")?;
    apply("pause")?;
    apply("replacing")?;
    expect(guest, ORIGINAL)?;
    PATCHES[1].expect(guest, true)?;
    let left = enabled(&outpatch)?;
    ensure!(left == ["replacing"], "these are applied: {left:?}");
    let pauses = guest
        .sh("cat $(grep -l '^sleep-pause$' /proc/[0-9]*/comm | head -1 | sed 's/comm/stack/')")?;
    ensure!(
        pauses.is_empty() || pauses.contains("__do_sys_pause"),
        "{pauses}"
    );
    revert("replacing")?;
    PATCHES[1].expect(guest, false)?;
    ensure!(enabled(&outpatch)?.is_empty(), "a patch is still applied");

    // Nothing is left: the same patches can be applied again.
    apply("livepatch-sample")?;
    expect(guest, SAMPLE.1)?;
    revert(SAMPLE.0)?;
    expect(guest, ORIGINAL)?;
    guest.sh("killall hammer; while [ ! -e /tmp/hammer ]; do sleep 0.1; done")?;
    let answers = guest.sh("head -n 1 /tmp/hammer")?;
    println!("{generation}: {answers}");
    ensure!(answers.contains(" wrong=0 "), "{answers}");
    guest.expect_unharmed(&log)
}

/// The names of the patches that are applied.
fn enabled(outpatch: &Outpatch) -> Result<Vec<String>> {
    let status = outpatch.json(&["status"])?;
    let patches = status["patches"].as_array().context("no patches")?;
    let enabled = patches.iter().filter(|patch| patch["enabled"] == true);
    enabled
        .map(|patch| Ok(patch["name"].as_str().context("no name")?.to_owned()))
        .collect()
}
