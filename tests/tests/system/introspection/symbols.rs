//! `outpatch symbols` compared with the guest's own `/proc/kallsyms`: every line, in the same
//! order, with modules and code that the kernel generates at runtime. Before that, in the same
//! boot, tasks and stacks are compared with the guest's own: [`stacks`].

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::harness::scratch::Scratch;
use crate::introspection::{locks, stacks};

pub fn scenarios() -> Vec<Scenario> {
    ["5.10", "6.1", "6.12", "7.2", "7.3"]
        .map(|generation| {
            // The oldest, and the one that no other plain scenario boots.
            let extra = !["5.10", "7.2"].contains(&generation);
            let name = format!("symbols::equal_with_stacks_{generation}");
            Scenario::new(name, move |fixture| equal(fixture, generation)).extra_if(extra)
        })
        .into()
}

/// Reading all of `/proc/kallsyms` takes an emulated guest some seconds, and so does loading
/// modules; on a busy host far longer.
const LISTING_LIMIT: Duration = Duration::from_secs(120);

/// The console is slow and a listing has megabytes, so checksums are compared, and where those
/// differ the checksums of this many lines at a time, to find the first lines that differ.
const CHUNK_LINES: usize = 1000;

fn equal(fixture: &Fixture, generation: &str) -> Result<()> {
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        let log = guest.dmesg()?;
        let compared = stacks::equal_in(guest)?;
        println!("{generation}: {compared} stacks equal");
        guest.expect_unharmed(&log)?;
        load_modules(guest)?;
        generate_code(guest)?;
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
            "{generation}: {} lines equal, {} of them of modules and generated code",
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
    /// The number of symbols.
    pub fn lines(&self) -> usize {
        self.text.lines().count()
    }

    /// The number of times that `end` ends a line.
    fn of(&self, end: &str) -> usize {
        self.text.matches(end).count()
    }
}

/// Loads every module of the stock kernel that the guest has.
pub fn load_modules(guest: &mut Guest) -> Result<()> {
    guest.sh_within(
        "(for m in $(cat /lib/modules/order); do insmod $m || exit 1; done)",
        LISTING_LIMIT,
    )?;
    Ok(())
}

/// Makes the guest generate code of each kind that is in `/proc/kallsyms`.
fn generate_code(guest: &mut Guest) -> Result<()> {
    guest.sh("bpf > /tmp/bpf & sleep 1; grep loaded /tmp/bpf")?;
    let tracing = "cd /sys/kernel/tracing";
    guest.sh(&format!(
        "{tracing}; echo vfs_read > set_ftrace_filter; echo function > current_tracer"
    ))?;
    // Somewhere after the entry, at the start of an instruction: the offset is found by trying.
    guest.sh(&format!(
        "{tracing}; for o in 5 6 7 8 9 10 11 12; do \
         echo \"p:inside vfs_write+$o\" > kprobe_events && break; done 2>/dev/null; \
         echo 1 > events/kprobes/inside/enable && sleep 2"
    ))?;
    Ok(())
}

/// Returns the listing if it equals the guest's.
pub fn same(guest: &mut Guest) -> Result<Listing> {
    let guest_sum = guest.sh_within(
        "cat /proc/kallsyms > /tmp/kallsyms; md5sum < /tmp/kallsyms",
        LISTING_LIMIT,
    )?;
    let text = guest.outpatch().clone().ok(&["symbols"])?;
    let sum = checksums([text.as_str()])?;
    if sum.first().map(String::as_str) == Some(guest_sum.trim()) {
        return Ok(Listing { text });
    }
    bail!("{}", difference(guest, &text)?)
}

/// Describes the first lines in which `text` differs from the guest's listing.
fn difference(guest: &mut Guest, text: &str) -> Result<String> {
    guest.sh_within(
        &format!(
            "rm -rf /tmp/k; mkdir /tmp/k; \
             awk '{{ f = sprintf(\"/tmp/k/%06d\", (NR - 1) / {CHUNK_LINES}); \
             if (f != l) close(l); l = f; print > f }}' /tmp/kallsyms"
        ),
        LISTING_LIMIT,
    )?;
    let guest_sums = guest.sh_within("for f in /tmp/k/*; do md5sum < $f; done", LISTING_LIMIT)?;
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let chunks: Vec<String> = lines
        .chunks(CHUNK_LINES)
        .map(|lines| lines.concat())
        .collect();
    let sums = checksums(chunks.iter().map(String::as_str))?;
    let guest_sums: Vec<&str> = guest_sums.lines().map(str::trim).collect();
    let pairs = sums.iter().zip(&guest_sums);
    let same = pairs.take_while(|(a, b)| a == b).count();
    let Some(_) = guest_sums.get(same) else {
        return Ok(format!(
            "outpatch lists more lines than the guest: {}",
            lines.len()
        ));
    };
    let listed = guest.sh_within(&format!("cat /tmp/k/{same:06}"), LISTING_LIMIT)?;
    let read = chunks.get(same).map_or("", String::as_str);
    let pairs = listed.lines().zip(read.lines());
    let different = pairs.filter(|(a, b)| a != b).take(8);
    let shown: Vec<String> = different
        .map(|(a, b)| format!("\nguest    {a}\noutpatch {b}"))
        .collect();
    Ok(format!(
        "{} lines where outpatch lists {}, in the first {CHUNK_LINES} that differ \
         (number {same}): {}",
        listed.lines().count(),
        read.lines().count(),
        shown.concat()
    ))
}

/// The checksum of each chunk, as `md5sum` prints it for its standard input.
fn checksums<'t>(chunks: impl IntoIterator<Item = &'t str>) -> Result<Vec<String>> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("chunk");
    let sum = |chunk: &str| {
        fs::write(&path, chunk)?;
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
    chunks.into_iter().map(sum).collect()
}

/// Checks that a core file has the same symbols, and what its readers report of locks that are
/// held.
pub fn in_a_core(guest: &mut Guest, live: &Listing) -> Result<()> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("guest.core");
    let file = path.to_str().context("a scratch folder in UTF-8")?;
    let outpatch = guest.outpatch().clone();
    outpatch.ok(&["dump", file])?;
    let reply = outpatch.offline(&["symbols", "--core", file])?;
    ensure!(reply.status == Some(0), "{}", reply.stderr);
    ensure!(reply.stdout == live.text, "a core has other symbols");
    locks::readers_report_busy(&path)
}
