//! Patches applied and reverted 50 times in one boot, under load, on each kernel, with 1, 2 and 4
//! vCPUs, with and without page-table isolation.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

/// How often each patch is applied and reverted in one boot.
const ROUNDS: u32 = 50;
/// How long one transition may take; after that it counts as stuck.
pub const TRANSITION_LIMIT: Duration = Duration::from_secs(60);
/// How many processes call the patched system call all the time.
const HAMMERS: u32 = 20;

/// A patch module, and how its effect can be seen in the guest.
#[derive(Debug)]
pub struct Patch {
    /// The file name without `.ko`.
    pub file: &'static str,
    /// The module's name.
    pub name: &'static str,
    /// A shell command whose output shows the effect.
    probe: &'static str,
    /// What the output contains if and only if the patch is in force.
    sign: &'static str,
}

/// The kernel's own sample, and a patch of a system call.
pub const PATCHES: [Patch; 2] = [
    Patch {
        file: "livepatch-sample",
        name: "livepatch_sample",
        probe: "cat /proc/cmdline",
        sign: "this has been live patched",
    },
    // It changes the result that `hammer` prints.
    Patch {
        file: "getpid",
        name: "getpid",
        probe: "hammer 0 - getpid",
        sign: "new",
    },
];

impl Patch {
    /// Checks in the guest that the patch is in force for a new process, or that it is not.
    pub fn expect(&self, guest: &mut Guest, patched: bool) -> Result<()> {
        let output = guest.sh(self.probe)?;
        ensure!(
            output.contains(self.sign) == patched,
            "whether {} is in force should be {patched}, but `{}` prints {output:?}",
            self.name,
            self.probe
        );
        Ok(())
    }
}

pub fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for generation in ["6.1", "6.12", "7.3"] {
        for cpus in [1, 2, 4] {
            for pti in [false, true] {
                let name = format!(
                    "apply_revert::{ROUNDS}_rounds_{generation}_{cpus}_vcpus{}",
                    if pti { "_pti" } else { "" }
                );
                let run = move |fixture: &Fixture| rounds(fixture, generation, cpus, pti);
                // A plain run has most and fewest vCPUs, and page-table isolation once; guests of
                // other scenarios have two.
                let plain = [("6.1", 4, false), ("6.12", 1, true)];
                let plain = plain.contains(&(generation, cpus, pti));
                all.push(Scenario::new(name, run).extra_if(!plain));
            }
        }
    }
    all
}

/// Two functions in one patch are patched together, and two patches are applied and reverted
/// independently of each other.
pub fn together(fixture: &Fixture, guest: &mut Guest, generation: &str) -> Result<()> {
    let [sample, getpid] = &PATCHES;
    let kernel = fixture.kernel(generation)?;
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;
    outpatch.ok(&["apply", kernel.patch("two-functions")?])?;
    ensure!(
        guest.sh("cat /proc/cmdline; hammer 0 - getpid")? == "both are new\nnew",
        "not both functions are new"
    );
    outpatch.ok(&["revert", "two_functions"])?;
    sample.expect(guest, false)?;
    getpid.expect(guest, false)?;
    outpatch.ok(&["apply", kernel.patch(sample.file)?])?;
    outpatch.ok(&["apply", kernel.patch(getpid.file)?])?;
    sample.expect(guest, true)?;
    getpid.expect(guest, true)?;
    outpatch.ok(&["revert", sample.name])?;
    sample.expect(guest, false)?;
    getpid.expect(guest, true)?;
    outpatch.ok(&["revert"])?;
    getpid.expect(guest, false)?;
    guest.expect_unharmed(&log)
}

fn rounds(fixture: &Fixture, generation: &str, cpus: u32, pti: bool) -> Result<()> {
    let append = if pti { "pti=on" } else { "" };
    fixture.with(fixture.boot(generation, cpus, append)?, |guest| {
        let kernel = fixture.kernel(generation)?;
        let (outpatch, rest) = (guest.outpatch().clone(), guest.rest());
        if pti {
            expect_pti(guest)?;
        }
        let log = guest.dmesg()?;
        guest.sh(&format!(
            "sleeper 16 & hammer {HAMMERS} /tmp/hammer & sleep 1"
        ))?;
        let started = Instant::now();
        for patch in &PATCHES {
            let module = fs::read(kernel.patch(patch.file)?)?;
            for round in 0..ROUNDS {
                rest.apply(&module, TRANSITION_LIMIT)?;
                // Checked in every tenth round only: starting a process in the guest takes longer
                // than applying a patch.
                if round % 10 == 0 {
                    patch.expect(guest, true)?;
                }
                rest.revert(patch.name, TRANSITION_LIMIT)?;
                if round % 10 == 0 {
                    patch.expect(guest, false)?;
                }
            }
        }
        let took = started.elapsed();
        let pauses = &outpatch.json(&["status"])?["vm"]["pauses"];
        let transitions = 4 * ROUNDS;
        println!(
            "{generation} {cpus} vCPUs pti={pti}: {transitions} transitions in {took:?}, \
             pauses {pauses}"
        );
        guest.sh("killall hammer; while [ ! -e /tmp/hammer ]; do sleep 0.1; done")?;
        let answers = guest.sh("cat /tmp/hammer")?;
        println!("{}", answers.lines().next().unwrap_or_default());
        ensure!(
            answers.contains(" wrong=0 "),
            "a system call returned a wrong result: {answers}"
        );
        guest.expect_unharmed(&log)
    })
}

fn expect_pti(guest: &mut Guest) -> Result<()> {
    let state = guest.sh(
        "cat /sys/devices/system/cpu/vulnerabilities/meltdown; dmesg | grep -i isolation || true",
    )?;
    ensure!(
        state.contains("PTI") || state.contains("page tables isolation: enabled"),
        "PTI is not on: {state}"
    );
    Ok(())
}
