//! `outpatch symbols` against the guest's own `/proc/kallsyms`: every line, in the same order, modules and made code included.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::Guest;

use crate::{
    Scenario,
    bench::{Bench, Scratch},
};

pub fn scenarios() -> Vec<Scenario> {
    ["5.10", "6.1", "6.12", "7.3"]
        .map(|generation| {
            Scenario::new(
                format!("symbols::equal_kallsyms_{generation}"),
                move |bench| equal(bench, generation),
            )
        })
        .into()
}

/// Reading all of `/proc/kallsyms` takes a guest some seconds here.
const LISTING_LIMIT: Duration = Duration::from_secs(120);

/// The console is slow and a listing has megabytes: guest and host sum up so many lines at a time, and only pieces whose sums
/// differ are looked at.
const PIECE: usize = 1000;

fn equal(bench: &Bench, generation: &str) -> Result<()> {
    bench.with(bench.boot(generation, 2, "")?, |guest| {
        let plain = same(guest)?;
        ensure!(plain.of("]\n") == 0, "a guest with modules at its start");

        load_modules(guest)?;
        let with_modules = same(guest)?;
        let modules = with_modules.of("[nfsd]\n");
        ensure!(modules > 500, "{modules} symbols of nfsd");
        for letter in [" T ", " t "] {
            let lines = with_modules.text.lines();
            let found = lines.filter(|l| l.ends_with("[sunrpc]") && l.contains(letter));
            ensure!(found.count() > 50, "no{letter}of a module that has both");
        }

        make_code(guest)?;
        let with_code = same(guest)?;
        for owner in ["bpf", "__builtin__ftrace", "__builtin__kprobes"] {
            ensure!(with_code.of(&format!("[{owner}]\n")) > 0, "none of {owner}");
        }
        println!(
            "{generation}: lines equal: {} as booted, {} with modules, {} with BPF, ftrace and kprobes",
            plain.lines(),
            with_modules.lines(),
            with_code.lines()
        );
        in_a_core(guest, &with_code)?;
        println!("{generation}: the same from a core");
        Ok(())
    })
}

/// What `outpatch symbols` printed.
struct Listing {
    text: String,
}

impl Listing {
    fn lines(&self) -> usize {
        self.text.lines().count()
    }

    fn of(&self, end: &str) -> usize {
        self.text.matches(end).count()
    }
}

/// Every stock module that the guest was given.
pub fn load_modules(guest: &mut Guest) -> Result<()> {
    guest.sh("for m in $(cat /lib/modules/order); do insmod $m || exit 1; done")?;
    Ok(())
}

/// Has the guest make code of each sort that is in `/proc/kallsyms`.
fn make_code(guest: &mut Guest) -> Result<()> {
    guest.sh("bpf > /tmp/bpf & sleep 1; grep loaded /tmp/bpf")?;
    let tracing = "cd /sys/kernel/tracing";
    guest.sh(&format!(
        "{tracing}; echo vfs_read > set_ftrace_filter; echo function > current_tracer"
    ))?;
    // Somewhere behind the entry, where an instruction begins: which offset that is, only trying tells.
    guest.sh(&format!(
        "{tracing}; for o in 5 6 7 8 9 10 11 12; do echo \"p:inside vfs_write+$o\" > kprobe_events && break; done 2>/dev/null; \
         echo 1 > events/kprobes/inside/enable && sleep 2"
    ))?;
    Ok(())
}

/// The listing, if it is the guest's.
fn same(guest: &mut Guest) -> Result<Listing> {
    guest.sh_within(
        &format!("rm -rf /tmp/k; mkdir /tmp/k; split -l {PIECE} -a 3 /proc/kallsyms /tmp/k/"),
        LISTING_LIMIT,
    )?;
    let theirs = guest.sh_within("cd /tmp/k; md5sum *", LISTING_LIMIT)?;
    let text = guest.outpatch().clone().ok(&["symbols"])?;
    let scratch = Scratch::new()?;
    let ours = sums(&text, scratch.path())?;
    if ours == theirs {
        return Ok(Listing { text });
    }
    let differs = theirs
        .lines()
        .find(|line| !ours.lines().any(|o| o == *line));
    let Some((_, piece)) = differs.and_then(|line| line.split_once("  ")) else {
        bail!(
            "we list more lines than the guest: {}",
            text.lines().count()
        );
    };
    let theirs = guest.sh_within(&format!("cat /tmp/k/{piece}"), LISTING_LIMIT)?;
    let ours = fs::read_to_string(scratch.path().join(piece)).unwrap_or_default();
    let pairs = theirs.lines().zip(ours.lines());
    let different = pairs.filter(|(a, b)| a != b).take(8);
    let shown: Vec<String> = different
        .map(|(a, b)| format!("\nguest {a}\nours  {b}"))
        .collect();
    bail!(
        "{} of {} lines in the first piece that differs ({piece}): {}",
        theirs.lines().count(),
        ours.lines().count(),
        shown.concat()
    )
}

/// The sums of the pieces of `text`, as the guest's `md5sum *` prints them. The pieces stay in `folder`.
fn sums(text: &str, folder: &Path) -> Result<String> {
    let whole = folder.join("whole.txt");
    fs::write(&whole, text)?;
    let script = format!("split -l {PIECE} -a 3 whole.txt '' && rm whole.txt && md5sum *");
    let out = Command::new("sh")
        .args(["-c", &script])
        .current_dir(folder)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

fn in_a_core(guest: &mut Guest, live: &Listing) -> Result<()> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("guest.core");
    let file = path.to_str().context("a scratch folder in UTF-8")?;
    let outpatch = guest.outpatch().clone();
    outpatch.ok(&["dump", file])?;
    let reply = outpatch.offline(&["symbols", "--core", file])?;
    ensure!(reply.status == Some(0), "{}", reply.stderr);
    ensure!(reply.stdout == live.text, "a core has other symbols");
    Ok(())
}
