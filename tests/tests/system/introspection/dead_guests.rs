//! Guests whose kernel has ended: with a lock held, or replaced by another kernel that leaves vCPUs
//! halted. What is left of them can be read, in the running VM and in a core file of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Outpatch};
use guests::kernel::Generation;
use serde_json::Value;

use crate::harness::assets::has_modules;
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::guest_tools::{KEXEC_LIMIT, kexec_kernel, prepare_kexec};

/// The command line of a kernel that is started with one of two CPUs.
const ONE_CPU: &str = "console=ttyS0 quiet panic=-1 tsc=reliable maxcpus=1";
/// How long a guest may take to panic.
const PANIC_LIMIT: Duration = Duration::from_secs(60);

pub fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for generation in [
        Generation::V5_10,
        Generation::V6_1,
        Generation::V6_12,
        Generation::V7_3,
    ] {
        let extra = generation != Generation::V6_1;
        let named = |what| format!("dead_guests::{what}_{generation}");
        let prepare = move |assets: &mut _| prepare_kexec(assets, generation);
        let mut scenarios = vec![
            Scenario::new(named("crash_kernel"), move |fixture| {
                crash_kernel(fixture, generation)
            }),
            // A plain run has the crash kernel, which has one CPU as well.
            Scenario::new(named("kexec_with_one_cpu"), move |fixture| {
                kexec_with_one_cpu(fixture, generation)
            })
            .extra_if(true),
        ];
        // A module makes the guest die.
        if has_modules(generation) {
            scenarios.push(Scenario::new(named("died_with_a_lock"), move |fixture| {
                died_with_a_lock(fixture, generation)
            }));
        }
        let prepared = scenarios.into_iter();
        all.extend(prepared.map(|scenario| scenario.prepare(prepare).extra_if(extra)));
    }
    all
}

/// The guest panics while it takes a task off the lists. Its VM stays, and is read with a warning.
fn died_with_a_lock(fixture: &Fixture, generation: Generation) -> Result<()> {
    let kernel = kexec_kernel(generation);
    let mut guest = fixture.boot(&kernel, 2, "panic=0")?;
    let outpatch = guest.outpatch().clone();
    guest.sh("sleeper 10 & sleep 1")?;
    let module = "/lib/patches/dies-with-lock.ko";
    guest
        .console()
        .type_in(&format!("insmod {module}; sleep 1\n"))?;
    guest.console().wait_for("Kernel panic", PANIC_LIMIT)?;

    let live = read_with_warning(&outpatch, &["ps", "--json"])?;
    ensure!(live.to_string().contains("sleep-"), "{live}");
    read_with_warning(&outpatch, &["stack", "--json"])?;
    let core = fixture.sockets().join("dead.core");
    let core = core.to_str().context("a path in UTF-8")?;
    outpatch.ok(&["dump", core])?;
    let of_core = read_with_warning(&outpatch, &["ps", "--json", "--core", core])?;
    let names = |tasks: &Value| -> Vec<Value> {
        let tasks = tasks.as_array().into_iter().flatten();
        tasks.map(|task| task["pid"].clone()).collect()
    };
    ensure!(names(&live) == names(&of_core), "{live}\n{of_core}");
    let stacks = read_with_warning(&outpatch, &["stack", "--json", "--core", core])?;
    let sleepers = stacks.as_array().into_iter().flatten();
    let sleepers = sleepers.filter(|stack| stack["task"]["state"] == "S");
    let reliable = sleepers.filter(|stack| stack["reliable"] == true).count();
    ensure!(reliable >= 10, "{reliable} reliable stacks: {stacks}");
    // What would change the guest is refused, and not with "try again".
    ensure_state(&outpatch, "panicked")?;
    let patch = fixture.kernel(&kernel)?.patch("pause")?;
    for command in ["apply", "check"] {
        let line = outpatch.refused(&[command, patch])?;
        ensure!(line.contains("has panicked"), "{line}");
        ensure!(!line.contains("again in a moment"), "{line}");
    }
    outpatch.ok(&["pause"])?;
    ensure_state(&outpatch, "paused")?;
    outpatch.ok(&["resume"])?;
    ensure_state(&outpatch, "panicked")?;
    Ok(())
}

fn ensure_state(outpatch: &Outpatch, state: &str) -> Result<()> {
    let status = outpatch.json(&["status"])?;
    ensure!(status["vm"]["state"] == state, "{status}");
    Ok(())
}

/// Runs a command that reads tasks, and checks that it succeeds and warns of the lock.
fn read_with_warning(outpatch: &Outpatch, args: &[&str]) -> Result<Value> {
    let reply = match args.contains(&"--core") {
        true => outpatch.offline(args)?,
        false => outpatch.call(args)?,
    };
    ensure!(reply.status == Some(0), "{args:?}: {}", reply.stderr);
    println!("{args:?}: {}", reply.stderr.trim());
    ensure!(
        reply.stderr.contains("warning: tasklist_lock is held"),
        "{args:?}: {}",
        reply.stderr
    );
    let answer: Value = serde_json::from_str(&reply.stdout)?;
    ensure!(answer.to_string().contains("tasklist_lock"), "{answer}");
    Ok(answer)
}

/// The guest panics on its second vCPU, which then runs the crash kernel.
fn crash_kernel(fixture: &Fixture, generation: Generation) -> Result<()> {
    let kernel = kexec_kernel(generation);
    fixture.with(fixture.boot(&kernel, 2, "crashkernel=192M")?, |guest| {
        guest.sh(&format!(
            "kexec -p /boot/vmlinuz /boot/initrd '{ONE_CPU} nr_cpus=1'; sleeper 10 & sleep 1"
        ))?;
        let old = kernel_and_sleepers(guest)?;
        ensure!(old.1, "no sleepers");
        let typed = "taskset 2 sh -c 'echo c > /proc/sysrq-trigger'\n";
        guest.console().type_in(typed)?;
        new_kernel_is_read(fixture, guest, &kernel)
    })
}

/// The guest replaces its kernel by one that uses the first vCPU only.
fn kexec_with_one_cpu(fixture: &Fixture, generation: Generation) -> Result<()> {
    let kernel = kexec_kernel(generation);
    fixture.with(fixture.boot(&kernel, 2, "")?, |guest| {
        guest.sh("sleeper 10 & sleep 1")?;
        let old = kernel_and_sleepers(guest)?;
        ensure!(old.1, "no sleepers");
        let typed = format!("kexec /boot/vmlinuz /boot/initrd '{ONE_CPU}'\n");
        guest.console().type_in(&typed)?;
        new_kernel_is_read(fixture, guest, &kernel)
    })
}

/// The kernel that `status` names, and whether `ps` has the sleepers of the first kernel.
fn kernel_and_sleepers(guest: &Guest) -> Result<(Value, bool)> {
    let outpatch = guest.outpatch();
    let kernel = outpatch.json(&["status"])?["vm"]["kernel"].clone();
    let tasks = outpatch.json(&["ps"])?;
    Ok((kernel, tasks.to_string().contains("sleep-")))
}

/// Once the shell of the new kernel is ready, every query answers for it, at the first attempt.
fn new_kernel_is_read(fixture: &Fixture, guest: &mut Guest, kernel: &str) -> Result<()> {
    guest.wait_for_next_boot(KEXEC_LIMIT)?;
    let start = Instant::now();
    let (found, sleepers) = kernel_and_sleepers(guest)?;
    ensure!(!found.is_null(), "no kernel is found");
    ensure!(!sleepers, "tasks of the first kernel are listed");
    println!("{kernel}: {found} found in {:?}", start.elapsed());
    let outpatch = guest.outpatch().clone();
    let live = outpatch.json(&["stack"])?;
    let on_vcpus = |stacks: &Value| {
        let stacks = stacks.as_array().into_iter().flatten();
        let vcpu = |stack: &Value| stack["task"]["vcpu"].as_u64();
        stacks.filter_map(vcpu).collect::<Vec<_>>()
    };
    ensure!(on_vcpus(&live).len() <= 1, "{live}");
    // As the new kernel's own list has it.
    let address = guest.sh("grep ' T schedule$' /proc/kallsyms")?;
    let symbols = outpatch.ok(&["symbols"])?;
    ensure!(
        symbols.contains(&address),
        "{address} is not among the symbols"
    );

    let core = fixture.sockets().join("replaced.core");
    let core = core.to_str().context("a path in UTF-8")?;
    outpatch.ok(&["pause"])?;
    outpatch.ok(&["dump", core])?;
    let tasks = outpatch.json(&["ps"])?;
    outpatch.ok(&["resume"])?;
    let of_core = outpatch.of_core(&["ps"], core)?;
    ensure!(tasks == of_core, "\nguest {tasks}\ncore  {of_core}");
    let stacks = outpatch.of_core(&["stack"], core)?;
    ensure!(on_vcpus(&stacks).len() <= 1, "{stacks}");
    let status = outpatch.json(&["status"])?;
    ensure!(status["vm"]["kernel"] == found, "{status}");
    guest.sh("true")?;
    Ok(())
}
