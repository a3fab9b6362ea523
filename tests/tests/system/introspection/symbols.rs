//! `outpatch symbols` against the guest's own `/proc/kallsyms`: every line, in the same order, modules and made code included. And
//! before them, in the same boot, tasks and stacks against the guest's own: [`stacks`].

use std::{fs, process::Command, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::harness::scratch::Scratch;
use crate::introspection::stacks;
use crate::patching::locks;

pub fn scenarios() -> Vec<Scenario> {
    ["5.10", "6.1", "6.12", "7.2", "7.3"]
        .map(|generation| {
            Scenario::new(
                format!("symbols::equal_with_stacks_{generation}"),
                move |fixture| equal(fixture, generation),
            )
        })
        .into()
}

/// Reading all of `/proc/kallsyms` takes a guest some seconds here, and so does loading modules; on a busy machine far longer.
const LISTING_LIMIT: Duration = Duration::from_secs(120);

/// The console is slow and a listing has megabytes: guest and host compare sums, and where those differ the sums of so many lines
/// at a time, to see the first that differ.
const PIECE: usize = 1000;

fn equal(fixture: &Fixture, generation: &str) -> Result<()> {
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        let log = guest.dmesg()?;
        let compared = stacks::equal_in(guest)?;
        println!("{generation}: {compared} stacks equal");
        guest.expect_unharmed(&log)?;
        load_modules(guest)?;
        make_code(guest)?;
        let listing = same(guest)?;
        let modules = listing.of("[nfsd]\n");
        ensure!(modules > 500, "{modules} symbols of nfsd");
        for letter in [" T ", " t "] {
            let lines = listing.text.lines();
            let found = lines.filter(|l| l.ends_with(']') && l.contains(letter));
            let found = found.count();
            ensure!(found >= 5, "{found}{letter}of modules, which have both");
        }
        for owner in ["bpf", "__builtin__ftrace", "__builtin__kprobes"] {
            ensure!(listing.of(&format!("[{owner}]\n")) > 0, "none of {owner}");
        }
        println!(
            "{generation}: {} lines equal, {} of them of modules and made code",
            listing.lines(),
            listing.of("]\n")
        );
        in_a_core(guest, &listing)?;
        println!("{generation}: the same from a core");
        Ok(())
    })
}

/// What `outpatch symbols` printed.
pub struct Listing {
    text: String,
}

impl Listing {
    /// How many symbols.
    pub fn lines(&self) -> usize {
        self.text.lines().count()
    }

    fn of(&self, end: &str) -> usize {
        self.text.matches(end).count()
    }
}

/// Every stock module that the guest was given.
pub fn load_modules(guest: &mut Guest) -> Result<()> {
    guest.sh_within(
        "(for m in $(cat /lib/modules/order); do insmod $m || exit 1; done)",
        LISTING_LIMIT,
    )?;
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
pub fn same(guest: &mut Guest) -> Result<Listing> {
    let theirs = guest.sh_within(
        "cat /proc/kallsyms > /tmp/kallsyms; md5sum < /tmp/kallsyms",
        LISTING_LIMIT,
    )?;
    let text = guest.outpatch().clone().ok(&["symbols"])?;
    let ours = sums([text.as_str()])?;
    if ours.first().map(String::as_str) == Some(theirs.trim()) {
        return Ok(Listing { text });
    }
    bail!("{}", difference(guest, &text)?)
}

/// The first lines in which `text` differs from the guest's listing.
fn difference(guest: &mut Guest, text: &str) -> Result<String> {
    guest.sh_within(
        &format!(
            "rm -rf /tmp/k; mkdir /tmp/k; \
             awk '{{ f = sprintf(\"/tmp/k/%06d\", (NR - 1) / {PIECE}); if (f != l) close(l); l = f; print > f }}' /tmp/kallsyms"
        ),
        LISTING_LIMIT,
    )?;
    let theirs = guest.sh_within("for f in /tmp/k/*; do md5sum < $f; done", LISTING_LIMIT)?;
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let pieces: Vec<String> = lines.chunks(PIECE).map(|lines| lines.concat()).collect();
    let ours = sums(pieces.iter().map(String::as_str))?;
    let theirs: Vec<&str> = theirs.lines().map(str::trim).collect();
    let same = ours.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
    let Some(_) = theirs.get(same) else {
        return Ok(format!(
            "we list more lines than the guest: {}",
            lines.len()
        ));
    };
    let theirs = guest.sh_within(&format!("cat /tmp/k/{same:06}"), LISTING_LIMIT)?;
    let ours = pieces.get(same).map_or("", String::as_str);
    let pairs = theirs.lines().zip(ours.lines());
    let different = pairs.filter(|(a, b)| a != b).take(8);
    let shown: Vec<String> = different
        .map(|(a, b)| format!("\nguest {a}\nours  {b}"))
        .collect();
    Ok(format!(
        "{} lines where we list {}, in the first {PIECE} that differ (number {same}): {}",
        theirs.lines().count(),
        ours.lines().count(),
        shown.concat()
    ))
}

/// The sum of each piece, as `md5sum` prints it of its standard input.
fn sums<'t>(pieces: impl IntoIterator<Item = &'t str>) -> Result<Vec<String>> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("piece");
    let sum = |piece: &str| {
        fs::write(&path, piece)?;
        let out = Command::new("md5sum")
            .stdin(fs::File::open(&path)?)
            .output()?;
        ensure!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(String::from_utf8(out.stdout)?.trim().to_owned())
    };
    pieces.into_iter().map(sum).collect()
}

/// The same from a core, and what its readers say of locks that are held.
pub fn in_a_core(guest: &mut Guest, live: &Listing) -> Result<()> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("guest.core");
    let file = path.to_str().context("a scratch folder in UTF-8")?;
    let outpatch = guest.outpatch().clone();
    outpatch.ok(&["dump", file])?;
    let reply = outpatch.offline(&["symbols", "--core", file])?;
    ensure!(reply.status == Some(0), "{}", reply.stderr);
    ensure!(reply.stdout == live.text, "a core has other symbols");
    locks::readers_say_busy(&path)
}
