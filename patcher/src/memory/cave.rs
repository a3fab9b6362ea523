//! The code cave: a long run of padding in the kernel's own text, where patch code goes first.
//!
//! `vmlinux.lds.S` aligns the entry text and the SRSO alias functions to 2 MiB and fills the gaps
//! with INT3. That memory is mapped RX, lies inside `[_stext, _etext)`, belongs to no function, and
//! `core_kernel_text()` is true for it. This module finds the best run of such bytes in a given
//! kernel; it must not know what goes there.

use introspect::memory::{KernelMemory, ReadError};
use introspect::x86::{LARGE_PAGE_SIZE, PAGE_SIZE};
use introspect::{Gva, GvaRange};

use crate::x86::INT3;

/// Shortest run that is used, in bytes. Shorter ones are padding between functions.
const MIN_CAVE: u64 = 64 << 10;
/// Upper bound of a kernel's text, in bytes: more than any kernel has.
const MAX_TEXT: u64 = 256 << 20;
const CHUNK: u64 = 64 << 10;
/// Bytes that are kept free at both ends of a run, and around addresses that must not have a branch
/// nearby.
const GUARD: u64 = 4 << 10;
/// The address bits in which the two functions of an SRSO alias pair differ
/// (`vmlinux.lds.S: SRSO_ALIAS`). A branch at an address that differs from the pair in any
/// combination of them shares a branch target buffer entry with it.
const ALIAS_BITS: [u64; 4] = [1 << 2, 1 << 8, 1 << 14, 1 << 20];

/// The addresses in a kernel's text that decide where code may go.
#[derive(Clone, Debug, Default)]
pub struct TextMap {
    /// The kernel's whole text, `[_stext, _etext)`.
    pub text: GvaRange,
    /// The entry text, whose 2 MiB pages are in the user's page tables under page table isolation.
    pub entry: GvaRange,
    /// The SRSO alias functions, in a kernel that has them.
    pub srso: Vec<Gva>,
}

/// The longest usable run of filler outside the entry text's pages, or if there is none, the
/// longest in them.
///
/// # Errors
/// [`ReadError`] when the text cannot be read.
pub fn find(memory: &KernelMemory<'_>, map: &TextMap) -> Result<Option<GvaRange>, ReadError> {
    let usable: Vec<GvaRange> = runs(memory, map.text)?
        .into_iter()
        .flat_map(|run| without_aliases(run, &map.srso))
        .filter(|run| run.len() >= MIN_CAVE)
        .collect();
    let beside_entry = |run: &GvaRange| {
        let entry_start = map.entry.start.0 / LARGE_PAGE_SIZE * LARGE_PAGE_SIZE;
        let entry_end = map.entry.end.0.next_multiple_of(LARGE_PAGE_SIZE);
        !map.entry.is_empty() && run.start.0 < entry_end && entry_start < run.end.0
    };
    for run in ranked(usable, beside_entry) {
        if is_code(memory, run)? {
            return Ok(Some(run));
        }
    }
    Ok(None)
}

/// Sorts longest first, with those beside the entry text after all others.
fn ranked(mut runs: Vec<GvaRange>, beside_entry: impl Fn(&GvaRange) -> bool) -> Vec<GvaRange> {
    runs.sort_by_key(|run| (beside_entry(run), std::cmp::Reverse(run.len())));
    runs
}

/// Runs of filler of at least [`MIN_CAVE`] bytes in `text`, less a guard at both ends.
fn runs(memory: &KernelMemory<'_>, text: GvaRange) -> Result<Vec<GvaRange>, ReadError> {
    let end = text.end.0.min(text.start.0.saturating_add(MAX_TEXT));
    let text = GvaRange::new(text.start, Gva(end));
    let mut found = Vec::new();
    for stretch in stretches(memory, text)? {
        scan(memory, stretch, &mut found)?;
    }
    Ok(found)
}

/// Stretches of pages that all begin with filler. The rest of each page is not read: nearly all of
/// text is code, and a run that is long enough covers many page starts.
fn stretches(memory: &KernelMemory<'_>, text: GvaRange) -> Result<Vec<GvaRange>, ReadError> {
    let mut found: Vec<GvaRange> = Vec::new();
    let mut page = text.start.0.next_multiple_of(PAGE_SIZE);
    while page < text.end.0 {
        if memory.u8(Gva(page))? == INT3 {
            let end = Gva((page + PAGE_SIZE).min(text.end.0));
            match found.last_mut() {
                Some(last) if last.end.0 == page => last.end = end,
                _ => found.push(GvaRange::new(Gva(page), end)),
            }
        }
        page += PAGE_SIZE;
    }
    found.retain(|stretch| stretch.len() >= MIN_CAVE);
    Ok(found)
}

/// Adds the runs of filler in `stretch` to `found`.
fn scan(
    memory: &KernelMemory<'_>,
    stretch: GvaRange,
    found: &mut Vec<GvaRange>,
) -> Result<(), ReadError> {
    let mut run_start = stretch.start.0;
    let mut close = |start: u64, end: u64| {
        if end.saturating_sub(start) >= MIN_CAVE {
            found.push(GvaRange::new(Gva(start + GUARD), Gva(end - GUARD)));
        }
    };
    let mut at = stretch.start.0;
    let mut chunk = Vec::new();
    while at < stretch.end.0 {
        let len = CHUNK.min(stretch.end.0 - at);
        chunk.resize(usize::try_from(len).unwrap_or_default(), 0);
        memory.read(Gva(at), &mut chunk)?;
        for (offset, _) in (0u64..).zip(&chunk).filter(|(_, byte)| **byte != INT3) {
            close(run_start, at + offset);
            run_start = at + offset + 1;
        }
        at += len;
    }
    close(run_start, stretch.end.0);
    Ok(())
}

/// The parts of `run` that are not near an alias of one of `functions`.
fn without_aliases(run: GvaRange, functions: &[Gva]) -> Vec<GvaRange> {
    let mut parts = vec![run];
    for function in functions {
        for choice in 0u64..1 << ALIAS_BITS.len() {
            let chosen = (0..).zip(ALIAS_BITS).filter(|(i, _)| choice >> i & 1 == 1);
            let alias = chosen.fold(function.0, |at, (_, bit)| at ^ bit);
            let hole = (alias.saturating_sub(GUARD), alias.saturating_add(GUARD));
            parts = parts
                .into_iter()
                .flat_map(|part| {
                    [
                        GvaRange::new(part.start, Gva(part.end.0.min(hole.0))),
                        GvaRange::new(Gva(part.start.0.max(hole.1)), part.end),
                    ]
                })
                .filter(|part| !part.is_empty())
                .collect();
        }
    }
    parts
}

/// Whether all of `run` is mapped executable and not writable.
fn is_code(memory: &KernelMemory<'_>, run: GvaRange) -> Result<bool, ReadError> {
    let mut at = run.start;
    while at < run.end {
        let mapping = memory.translate(at)?;
        if !mapping.executable || mapping.writable {
            return Ok(false);
        }
        at = at.add(mapping.page_size - at.0 % mapping.page_size);
    }
    Ok(true)
}

/// Whether `range` holds nothing but filler.
///
/// # Errors
/// [`ReadError`] when it cannot be read.
pub fn is_filler(memory: &KernelMemory<'_>, range: GvaRange) -> Result<bool, ReadError> {
    let cap = usize::try_from(MAX_TEXT).unwrap_or(usize::MAX);
    let bytes = memory.bytes(range.start, range.len(), cap)?;
    Ok(bytes.iter().all(|byte| *byte == INT3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::mock::Mock;

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    /// Present: supervisor, read-only, executable.
    const RX: u64 = 0x1;
    const SIZE: u64 = 0x60_0000;

    /// Six MiB of code (0x90) with runs of filler at the given offsets.
    fn machine(runs: &[(u64, u64)]) -> Mock {
        let mut machine = Mock::new((Mock::FREE + SIZE) as usize);
        for page in (0..SIZE).step_by(0x1000) {
            machine.map(Gva(TEXT + page), Mock::FREE + page, RX);
        }
        machine.put(Mock::FREE, &vec![0x90; SIZE as usize]);
        for (start, end) in runs {
            machine.put(Mock::FREE + start, &vec![INT3; (end - start) as usize]);
        }
        machine
    }

    fn map() -> TextMap {
        let at = |offset| Gva(TEXT + offset);
        TextMap {
            text: GvaRange::new(at(0), at(SIZE)),
            entry: GvaRange::new(at(0x40_0000), at(0x40_1000)),
            srso: Vec::new(),
        }
    }

    fn found(machine: &Mock, map: &TextMap) -> Option<(u64, u64)> {
        let run = find(&machine.kernel_memory(), map).unwrap()?;
        Some((run.start.0 - TEXT, run.end.0 - TEXT))
    }

    #[test]
    fn chooses_the_longest_run_away_from_entry_text() {
        let machine = machine(&[
            (0x1_2345, 0x4_0000),
            (0x10_0004, 0x18_0000),
            (0x40_2000, 0x60_0000),
        ]);
        // The run's first page begins in code, and a guard page is kept at both ends.
        assert_eq!(found(&machine, &map()), Some((0x10_2000, 0x17_f000)));
    }

    #[test]
    fn chooses_a_run_beside_entry_text_only_when_there_is_no_other() {
        let machine = machine(&[(0x1000, 0x8000), (0x40_2000, 0x5f_0000)]);
        assert_eq!(found(&machine, &map()), Some((0x40_3000, 0x5e_f000)));
        let none = self::machine(&[(0x1000, 0x8000)]);
        assert_eq!(found(&none, &map()), None);
    }

    #[test]
    fn one_foreign_byte_ends_a_run() {
        let mut machine = machine(&[(0x10_0000, 0x20_0000)]);
        machine.put(Mock::FREE + 0x14_0123, &[0x90]);
        assert_eq!(found(&machine, &map()), Some((0x14_1124, 0x1f_f000)));
    }

    #[test]
    fn keeps_away_from_srso_aliases() {
        let machine = machine(&[(0x2000, 0x10_4000)]);
        let mut map = map();
        map.srso = vec![Gva(TEXT), Gva(TEXT + 0x10_4104)];
        assert_eq!(found(&machine, &map), Some((0x5104, 0xf_f000)));
    }

    #[test]
    fn writable_or_data_pages_are_no_cave() {
        for bits in [0x3, 1 | 1 << 63] {
            let mut machine = machine(&[(0x10_0000, 0x20_0000)]);
            machine.map(Gva(TEXT + 0x18_0000), Mock::FREE + 0x18_0000, bits);
            assert_eq!(found(&machine, &map()), None, "{bits:#x}");
        }
    }

    #[test]
    fn filler_is_verified() {
        let mut machine = machine(&[(0x10_0000, 0x20_0000)]);
        let at = |offset| Gva(TEXT + offset);
        let range = GvaRange::new(at(0x10_1000), at(0x10_3000));
        assert!(is_filler(&machine.kernel_memory(), range).unwrap());
        machine.put(Mock::FREE + 0x10_2fff, &[0]);
        assert!(!is_filler(&machine.kernel_memory(), range).unwrap());
    }
}
