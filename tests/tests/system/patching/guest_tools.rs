//! The guest's own tracing tools together with a patch, on the function that it patches and on
//! others, started before the patch and after it: each works, or is refused with its reason, and
//! the kernel never warns.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Outpatch};
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use guests::kernel::{Flavour, Generation};

use crate::harness::assets::{Assets, has_modules};
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::blocked_tasks::stays_blocked;

/// Changes to the folder of the files that control ftrace.
const TRACING: &str = "cd /sys/kernel/tracing";
/// The function that the sample patches.
const PATCHED: &str = "cmdline_proc_show";
/// Another function, which `cat /proc/version` calls.
const OTHER: &str = "version_proc_show";
/// How long one call of a tool may take.
const LIMIT: Duration = Duration::from_secs(60);

pub fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for generation in ["6.1", "6.12", "7.3"] {
        all.push(
            Scenario::new(
                format!("guest_tools::beside_a_patch_{generation}"),
                move |fixture| beside_a_patch(fixture, generation),
            )
            .extra_if(generation != "7.3"),
        );
        all.push(
            Scenario::new(
                format!("guest_tools::ends_in_mid_transition_{generation}"),
                move |fixture| ends(fixture, generation),
            )
            .extra_if(generation != "6.12"),
        );
    }
    for generation in [Generation::V6_1, Generation::V6_12, Generation::V7_3] {
        let kexec = Scenario::new(
            format!("guest_tools::kexec_in_mid_transition_{generation}"),
            move |fixture| kexec(fixture, generation),
        );
        let kexec = kexec.prepare(move |assets| prepare_kexec(assets, generation));
        all.push(kexec.extra_if(generation != Generation::V6_12));
    }
    all
}

fn beside_a_patch(fixture: &Fixture, generation: &str) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let sample = kernel.patch("livepatch-sample")?;
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        let outpatch = guest.outpatch().clone();
        let log = guest.dmesg()?;
        users_are_named(guest, &outpatch, sample)?;

        // Tracing of another function and a patch work at the same time.
        guest.sh(&format!(
            "{TRACING}; echo {OTHER} > set_ftrace_filter; echo function > current_tracer"
        ))?;
        outpatch.ok(&["apply", sample])?;
        expect_in_force(guest, true)?;
        ensure!(
            traced(guest, OTHER, "version")?,
            "the other function is not traced"
        );

        // Tracing of the patched function is refused by ftrace, and a pattern that matches many
        // functions leaves it out. (A tracer that is on when its filter is emptied traces all
        // functions for a moment, which takes an emulated guest a minute.)
        guest.sh(&format!("{TRACING}; echo nop > current_tracer"))?;
        let (status, output) = guest.try_sh(
            &format!("{TRACING}; echo {PATCHED} > set_ftrace_filter"),
            LIMIT,
        )?;
        println!("{generation}: tracing the patched function: {output}");
        ensure!(status != 0, "it can be traced");
        guest.sh(&format!(
            "{TRACING}; echo '*_proc_show' > set_ftrace_filter; echo function > current_tracer"
        ))?;
        ensure!(
            traced(guest, OTHER, "version")?,
            "the other function is not traced"
        );
        ensure!(
            !traced(guest, PATCHED, "cmdline")?,
            "the patched function was traced"
        );
        expect_in_force(guest, true)?;
        guest.sh(&format!(
            "{TRACING}; echo nop > current_tracer; echo > set_ftrace_filter"
        ))?;
        kprobe_after_the_patch(guest)?;
        expect_in_force(guest, true)?;
        start_on_the_patched(guest)?;
        expect_in_force(guest, true)?;

        // The guest's own livepatching is refused, for any function.
        for file in ["cmdline", "getpid"] {
            let (status, output) =
                guest.try_sh(&format!("insmod /lib/patches/{file}.ko"), LIMIT)?;
            println!("{generation}: insmod {file}.ko: {output}");
            ensure!(status != 0, "the guest patched it as well: {output}");
        }
        expect_in_force(guest, true)?;
        outpatch.ok(&["revert"])?;
        expect_in_force(guest, false)?;
        work_after_revert(guest, generation)?;
        tracing_works(guest)?;
        let new = guest.dmesg_since(&log)?;
        let expected = ["cmdline: ", "getpid: ", "livepatch: "];
        let warned = new
            .iter()
            .find(|line| !expected.iter().any(|start| line.starts_with(start)));
        ensure!(warned.is_none(), "in the guest's log: {warned:?}");

        // What was refused works now.
        guest.sh("insmod /lib/patches/cmdline.ko")?;
        Ok(())
    })
}

/// A patch of a function that has a user in the guest is refused, and names the user.
fn users_are_named(guest: &mut Guest, outpatch: &Outpatch, sample: &str) -> Result<()> {
    for (on, off, word) in [
        (
            format!("echo {PATCHED} > set_ftrace_filter; echo function > current_tracer"),
            "echo nop > current_tracer; echo > set_ftrace_filter",
            "ftrace",
        ),
        (
            format!("echo 'p:tools/one {PATCHED}' > kprobe_events; echo 1 > events/tools/enable"),
            "echo 0 > events/tools/enable; echo > kprobe_events",
            "kprobe",
        ),
        (
            format!(
                "bpf {PATCHED} > /tmp/bpf & until grep -q attached /tmp/bpf; do sleep 0.1; done"
            ),
            "killall bpf; sleep 1",
            "BPF",
        ),
    ] {
        guest.sh(&format!("{TRACING}; {on}"))?;
        let line = outpatch.refused(&["apply", sample])?;
        println!("{line}");
        ensure!(line.contains(word) && line.contains(PATCHED), "{line}");
        guest.sh(&format!("{TRACING}; {off}"))?;
    }
    Ok(())
}

/// Checks that the patch is in force, or that it is not.
fn expect_in_force(guest: &mut Guest, patched: bool) -> Result<()> {
    let line = guest.sh("cat /proc/cmdline")?;
    ensure!(line.contains("live patched") == patched, "{line}");
    Ok(())
}

/// Whether the function tracer sees `function` when `/proc/FILE` is read.
fn traced(guest: &mut Guest, function: &str, file: &str) -> Result<bool> {
    let count = guest.sh(&format!(
        "{TRACING}; echo > trace; cat /proc/{file} > /dev/null; sleep 0.2
grep -c {function} trace || true"
    ))?;
    Ok(count != "0")
}

/// A probe on the entry of the patched function is accepted or refused, and can be removed.
fn kprobe_after_the_patch(guest: &mut Guest) -> Result<()> {
    let (status, output) = guest.try_sh(
        &format!(
            "{TRACING}
echo 'p:tools/late {PATCHED}' > kprobe_events && echo 1 > events/tools/enable"
        ),
        LIMIT,
    )?;
    println!("a kprobe on the patched function: {status} {output}");
    guest.sh(&format!(
        "cat /proc/cmdline; {TRACING}
[ ! -e events/tools/enable ] || echo 0 > events/tools/enable; echo > kprobe_events"
    ))?;
    Ok(())
}

/// The kernel accepts a probe and a BPF program on the entry of the patched function, and a BPF
/// program on the entry of another, and does not change the patched function's entry.
fn start_on_the_patched(guest: &mut Guest) -> Result<()> {
    guest.sh(&format!(
        "{TRACING}; echo 'p:tools/stays {PATCHED}' > kprobe_events; echo 1 > events/tools/enable
for function in {PATCHED} {OTHER}; do
  bpf $function > /tmp/bpf-$function 2>&1 & until [ -s /tmp/bpf-$function ]; do sleep 0.1; done
  grep attached /tmp/bpf-$function || exit 1
done
echo > trace; cat /proc/cmdline /proc/version"
    ))?;
    let hits = guest.sh(&format!("{TRACING}; grep -c stays trace || true"))?;
    ensure!(hits == "0", "the probe was hit {hits} times");
    Ok(())
}

/// Once the patch is reverted these users are counted, work from ftrace's next change on, and can
/// be removed completely.
fn work_after_revert(guest: &mut Guest, generation: &str) -> Result<()> {
    guest.sh(&format!(
        "{TRACING}; echo {OTHER} > set_ftrace_filter; echo function > current_tracer
echo > trace; cat /proc/cmdline"
    ))?;
    let hits = guest.sh(&format!("{TRACING}; grep -c stays: trace"))?;
    ensure!(hits == "1", "the probe was hit {hits} times");
    let enabled = guest.sh(&format!("{TRACING}; cat enabled_functions"))?;
    println!("{generation}: enabled functions: {enabled}");
    let counted = format!("{PATCHED} (2)");
    ensure!(
        enabled.lines().any(|line| line.starts_with(&counted)),
        "not counted: {enabled}"
    );
    let left = guest.sh(&format!(
        "{TRACING}; echo nop > current_tracer; echo > set_ftrace_filter; killall bpf; sleep 1
echo 0 > events/tools/enable; echo > kprobe_events; cat enabled_functions"
    ))?;
    ensure!(left.is_empty(), "these functions are still traced: {left}");
    Ok(())
}

/// The function can be traced again.
fn tracing_works(guest: &mut Guest) -> Result<()> {
    guest.sh(&format!(
        "{TRACING}; echo {PATCHED} > set_ftrace_filter; echo function > current_tracer"
    ))?;
    ensure!(traced(guest, PATCHED, "cmdline")?, "it cannot be traced");
    guest.sh(&format!(
        "{TRACING}; echo nop > current_tracer; echo > set_ftrace_filter"
    ))?;
    Ok(())
}

/// A guest that reboots, panics or is powered off in mid-transition ends as at any other time.
fn ends(fixture: &Fixture, generation: &str) -> Result<()> {
    let patch = fixture.kernel(generation)?.patch("pause")?;
    for typed in [
        "reboot -f\n",
        "echo c > /proc/sysrq-trigger\n",
        "poweroff -f\n",
    ] {
        let mut guest = fixture.boot(generation, 2, "")?;
        let outpatch = guest.outpatch().clone();
        guest.sh("sleeper 10 & sleep 1")?;
        stays_blocked(&mut guest, &outpatch, patch)?;
        guest.console().type_in(typed)?;
        let end = guest.wait_end(LIMIT)?;
        ensure!(end.code() == Some(0), "typed {typed:?}: {end}");
    }
    Ok(())
}

/// How long a guest may take from one kernel to the shell of the next.
pub const KEXEC_LIMIT: Duration = Duration::from_secs(120);

/// The name of the kernel of a guest that can start another one, among the assets.
pub fn kexec_kernel(generation: Generation) -> String {
    format!("{generation}-kexec")
}

/// On the host: adds a kernel whose guest has the kernel in its own files, too.
pub fn prepare_kexec(assets: &mut Assets, generation: Generation) -> Result<()> {
    let plain = assets.kernels.get(&generation.to_string());
    let initrd = plain
        .context("no kernel of this generation")?
        .initrd
        .clone();
    let kernel = PreparedKernel::prepare(KernelSpec {
        generation,
        flavour: Flavour::Cloud,
        patches: match has_modules(generation) {
            true => &["pause", "dies-with-lock"],
            false => &[],
        },
        modules: &[],
        boot: Some(&initrd),
    })?;
    assets.kernels.insert(kexec_kernel(generation), kernel);
    Ok(())
}

/// A guest that starts another kernel loses the patches of the old one, which is reported; the new
/// kernel can be patched.
fn kexec(fixture: &Fixture, generation: Generation) -> Result<()> {
    let name = kexec_kernel(generation);
    let patch = fixture.kernel(&name)?.patch("pause")?;
    fixture.with(fixture.boot(&name, 2, "")?, |guest| {
        let outpatch = guest.outpatch().clone();
        guest.sh("sleeper 10 & sleep 1")?;
        stays_blocked(guest, &outpatch, patch)?;
        guest.console().type_in(
            "kexec /boot/vmlinuz /boot/initrd 'console=ttyS0 quiet panic=-1 tsc=reliable'\n",
        )?;
        guest.wait_for_next_boot(KEXEC_LIMIT)?;

        // The first call reports the new kernel, unless the transition has already been given up.
        let reply = outpatch.call(&["ps"])?;
        println!("after kexec: {:?} {}", reply.status, reply.stderr.trim());
        let tasks = outpatch.json(&["ps"])?;
        ensure!(tasks.to_string().contains("kthreadd"), "{tasks}");
        let status = outpatch.json(&["status"])?;
        ensure!(!status.to_string().contains("applying"), "{status}");

        let log = guest.dmesg()?;
        guest.sh("sleeper 10 & sleep 1")?;
        outpatch.ok(&["apply", patch, "--signal-after", "0", "--timeout", "60"])?;
        outpatch.ok(&["revert", "pause", "--signal-after", "0", "--timeout", "60"])?;
        guest.expect_unharmed(&log)
    })
}
