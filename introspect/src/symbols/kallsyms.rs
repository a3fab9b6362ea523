//! Finds and reads kallsyms in a copy of the kernel image, by its structure, in every layout from
//! 5.10 to 7.x.
//!
//! `scripts/kallsyms.c` writes these tables into the kernel's read-only data, each at a label:
//! - up to 6.3: offsets, relative_base, num_syms, names, markers, (seqs_of_names), token_table,
//!   token_index;
//! - 6.4 on: num_syms, names, markers, token_table, token_index, offsets, relative_base,
//!   seqs_of_names;
//! - 7.x: the same without relative_base: each offset is relative to its own address.
//!
//! No kernel version decides which it is: the token table is recognised by its digits, the other
//! tables by how they fit together, and the encoding of addresses by the address of `_text`, which
//! must be the base of the image that the page tables show.

use std::cell::Cell;

use crate::addr::{Gva, GvaRange};
use crate::symbols::Builder;
pub use crate::symbols::{Symbol, SymbolError, Symbols};

/// The number of tokens: one for each value of a byte.
const TOKENS: usize = 256;
/// The most symbols that are read: stock kernels have about 200,000.
const MAX_SYMBOLS: u32 = 1 << 19;
/// The most bytes of the token table: 256 tokens, few of them over 16 bytes.
const MAX_TOKEN_TABLE: usize = 8192;
/// The most bytes of a compressed name (`KSYM_NAME_LEN` is 512).
const MAX_NAME: usize = 1024;
/// The most characters of a name. Each byte of the compressed one can stand for a token of any
/// length.
const MAX_EXPANDED: usize = 1024;
/// The most characters of all names together; stock kernels have about 5 MiB.
const MAX_NAMES: usize = 16 << 20;
/// The most steps to find and read the tables, in bytes and words examined: some ten times what an
/// honest kernel takes. A guest can put places that look like tables and are none as close together
/// as it likes, and each costs a search of its own.
const MAX_STEPS: usize = 1 << 27;
/// The steps that one symbol counts for when all are sorted.
const SORT: usize = 20;
/// The number of names for each marker.
const MARKED: usize = 256;
/// The bytes that 256 names take: at least two each, less than 64 KiB together.
const MARKER_STEP: std::ops::Range<u32> = 0x200..0x10000;
/// The fewest markers of a table: a kernel has many more symbols than this times 256, and few other
/// runs of ascending numbers are so long.
const MIN_MARKERS: usize = 64;
/// The alignment of labels, in bytes.
const ALIGN: usize = 4;
/// `"0\0" "1\0" … "9\0"`: digits are never part of a longer token, so these tokens always look like
/// this.
pub(crate) const DIGITS: [u8; 20] = *b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";

/// Why no symbols were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KallsymsError {
    /// There is no token table with an index.
    #[error("there is no kallsyms token table in the kernel's read-only data")]
    NoTokens,
    /// There is a token table, here, but before it are no names that its markers fit.
    #[error("there is a kallsyms token table at {0}, but no symbol names fit it")]
    NoNames(Gva),
    /// Too many places look like tables and are none: the budget of steps is spent.
    #[error("too many places in the kernel's read-only data look like kallsyms tables")]
    Endless,
    /// There are names, here, but no table of addresses in which `_text` is the base of the image.
    #[error("there are kallsyms names at {0}, but no table of addresses fits them")]
    NoAddresses(Gva),
}

/// A part of the kernel image, copied out of the guest.
#[derive(Clone, Copy, Debug)]
pub struct ImagePart<'b> {
    /// The virtual address of the first byte.
    pub start: Gva,
    /// The bytes that were read.
    pub bytes: &'b [u8],
}

impl<'b> ImagePart<'b> {
    fn get(&self, at: usize, len: usize) -> Option<&'b [u8]> {
        self.bytes.get(at..at.checked_add(len)?)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.get(at, 4)?.try_into().ok()?))
    }

    fn u64(&self, at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(self.get(at, 8)?.try_into().ok()?))
    }

    fn u32s(&self, at: usize, count: usize) -> Option<impl Iterator<Item = u32> + use<'b>> {
        let raw = self.get(at, count.checked_mul(4)?)?;
        Some(raw.chunks_exact(4).map(|word| {
            word.try_into().map_or(0, u32::from_le_bytes) // always four bytes
        }))
    }

    fn gva(&self, at: usize) -> Gva {
        self.start.add(at as u64)
    }
}

/// The token table and the index after it.
#[derive(Debug)]
struct Tokens {
    /// Offset of the table in the part.
    table: usize,
    /// Offset of the index in the part.
    index: usize,
    /// The tokens, by the byte that stands for each.
    tokens: Vec<String>,
}

/// Where the names are, and how many.
#[derive(Debug)]
struct Names {
    /// Offset of `kallsyms_num_syms`.
    num_syms: usize,
    /// Offset of `kallsyms_names`.
    names: usize,
    count: usize,
}

/// The steps that are left of [`MAX_STEPS`].
#[derive(Debug)]
pub(crate) struct Steps(Cell<usize>);

impl Steps {
    pub(crate) fn new() -> Steps {
        Steps(Cell::new(MAX_STEPS))
    }

    /// Takes `steps`; `None` when none are left, and from then on.
    fn take(&self, steps: usize) -> Option<()> {
        let left = self.0.get().saturating_sub(steps);
        self.0.set(left);
        (left > 0).then_some(())
    }

    fn are_spent(&self) -> bool {
        self.0.get() == 0
    }
}

/// How an entry of the offsets table becomes an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// `CONFIG_KALLSYMS_ABSOLUTE_PERCPU`: an entry that is not negative is absolute; a negative one
    /// is `base - 1 - offset`.
    AbsolutePerCpu(u64),
    /// Unsigned distance from this base.
    Based(u64),
    /// Signed distance from the entry's own address.
    Relative,
}

/// The offset of the first token-table digits at `from` or later.
#[must_use]
pub fn digits(bytes: &[u8], from: usize) -> Option<usize> {
    // Like Horspool's search, but by the last two bytes under the pattern: images have many more
    // zeroes than digits.
    let mut at = from;
    while let Some(part) = bytes.get(at..at.checked_add(DIGITS.len())?) {
        at += match part {
            [.., b'9', 0] if part == DIGITS => return Some(at),
            [.., digit @ b'0'..=b'8', 0] => 2 * usize::from(b'9' - digit),
            [.., digit @ b'0'..=b'9'] => 2 * usize::from(b'9' - digit) + 1,
            _ => DIGITS.len(),
        };
    }
    None
}

/// Reads every symbol from `part`, which holds the image's read-only data. `image` has the virtual
/// addresses of the image.
///
/// # Errors
/// [`KallsymsError`], with the table that was found last.
pub fn parse(part: ImagePart<'_>, image: GvaRange) -> Result<Symbols, KallsymsError> {
    parse_from(part, image, 0, &Steps::new())
}

/// As [`parse`], for token tables whose digits begin at `from` or later.
pub(crate) fn parse_from(
    part: ImagePart<'_>,
    image: GvaRange,
    mut from: usize,
    steps: &Steps,
) -> Result<Symbols, KallsymsError> {
    let mut error = KallsymsError::NoTokens;
    while let Some(hit) = digits(part.bytes, from) {
        from = hit + 1;
        if let Some(tokens) = Tokens::find(part, hit, steps) {
            match parse_with(part, image, &tokens, steps) {
                Ok(symbols) => return Ok(symbols),
                Err(found) => error = found,
            }
        }
        if steps.are_spent() {
            return Err(KallsymsError::Endless);
        }
    }
    Err(error)
}

fn parse_with(
    part: ImagePart<'_>,
    image: GvaRange,
    tokens: &Tokens,
    steps: &Steps,
) -> Result<Symbols, KallsymsError> {
    let names =
        Names::find(part, tokens, steps).ok_or(KallsymsError::NoNames(part.gva(tokens.table)))?;
    addresses(part, image.start, tokens, &names, steps)
        .and_then(|addresses| collect(part, image, tokens, &names, addresses, steps))
        .ok_or(KallsymsError::NoAddresses(part.gva(names.names)))
}

impl Tokens {
    /// The table whose token for `'0'` is at `hit`. Its index follows it, at one of the next
    /// labels.
    fn find(part: ImagePart<'_>, hit: usize, steps: &Steps) -> Option<Tokens> {
        let first = (hit + DIGITS.len()).next_multiple_of(ALIGN);
        (first..hit + MAX_TOKEN_TABLE)
            .step_by(ALIGN)
            .map_while(|index| steps.take(1).map(|()| index))
            .find_map(|index| Tokens::with_index(part, hit, index, steps))
    }

    fn with_index(part: ImagePart<'_>, hit: usize, index: usize, steps: &Steps) -> Option<Tokens> {
        let raw = part.get(index, TOKENS * 2)?;
        let starts = || {
            raw.chunks_exact(2)
                .map(|pair| pair.try_into().map_or(0, u16::from_le_bytes)) // always two bytes
        };
        // A cheap test first: almost every candidate fails here.
        if raw.get(..2)? != [0, 0] || starts().zip(starts().skip(1)).any(|(a, b)| a >= b) {
            return None;
        }
        steps.take(MAX_TOKEN_TABLE)?;
        let table = hit.checked_sub(usize::from(starts().nth(usize::from(b'0'))?))?;
        let mut tokens = Vec::with_capacity(TOKENS);
        for start in starts() {
            let at = table + usize::from(start);
            if start != 0 && part.bytes.get(at - 1) != Some(&0) {
                return None;
            }
            let rest = part.bytes.get(at..index)?;
            let token = rest.get(..rest.iter().position(|&byte| byte == 0)?)?;
            if !token.is_ascii() {
                return None;
            }
            tokens.push(String::from_utf8_lossy(token).into_owned());
        }
        Some(Tokens {
            table,
            index,
            tokens,
        })
    }
}

impl Names {
    /// Markers lie somewhere before the token table (6.1 has a table between them), and names end
    /// where markers begin.
    fn find(part: ImagePart<'_>, tokens: &Tokens, steps: &Steps) -> Option<Names> {
        let mut at = tokens.table / ALIGN * ALIGN;
        while let Some(next) = at.checked_sub(ALIGN) {
            at = next;
            steps.take(1)?;
            // Every table of markers begins with 0.
            if part.u32(at) != Some(0) {
                continue;
            }
            let markers = markers_at(part, at, tokens.table);
            steps.take(markers.len())?;
            if markers.len() < MIN_MARKERS {
                continue;
            }
            if let Some(names) = Names::before(part, at, &markers, steps) {
                return Some(names);
            }
        }
        None
    }

    /// The names that end at `end`, where `markers` begin.
    fn before(part: ImagePart<'_>, end: usize, markers: &[u32], steps: &Steps) -> Option<Names> {
        let last = usize::try_from(*markers.last()?).ok()?;
        let max = u32::try_from(markers.len().checked_mul(MARKED)?).ok()?;
        let min = max.saturating_sub(255);
        // The names after the last marker take between nothing and a step.
        let top = end.checked_sub(last)? / ALIGN * ALIGN;
        let bottom = top.saturating_sub(MARKER_STEP.end as usize);
        for num_syms in (bottom..top).step_by(ALIGN).rev() {
            steps.take(1)?;
            let count = part.u32(num_syms)?;
            if !(min..=max).contains(&count) || count > MAX_SYMBOLS {
                continue;
            }
            for names in [num_syms + 4, num_syms + 8] {
                let found = Names {
                    num_syms,
                    names,
                    count: usize::try_from(count).ok()?,
                };
                if found.fit(part, end, markers, steps) {
                    return Some(found);
                }
            }
        }
        None
    }

    /// Whether the names end at `end`, and the markers point to every 256th of them.
    fn fit(&self, part: ImagePart<'_>, end: usize, markers: &[u32], steps: &Steps) -> bool {
        let mut at = self.names;
        for n in 0..self.count {
            if steps.take(1).is_none() {
                return false;
            }
            if n % MARKED == 0
                && markers.get(n / MARKED).map(|&m| self.names + m as usize) != Some(at)
            {
                return false;
            }
            match name_at(part, at) {
                Some((_, next)) if next <= end => at = next,
                _ => return false,
            }
        }
        end - at < 8
    }
}

/// The ascending run of markers at `at`, no longer than symbols can need. It never passes a 0,
/// where another table may begin, so words that were examined for one run are not examined again
/// for the next.
fn markers_at(part: ImagePart<'_>, at: usize, end: usize) -> Vec<u32> {
    let mut markers: Vec<u32> = Vec::new();
    let Some(words) = part.u32s(at, (end - at) / 4) else {
        return markers;
    };
    for word in words.take(MAX_SYMBOLS as usize / MARKED) {
        let step = markers.last().map(|&last| word.checked_sub(last));
        match step {
            None => markers.push(word),
            Some(Some(step)) if MARKER_STEP.contains(&step) => markers.push(word),
            Some(_) => break,
        }
    }
    markers
}

/// The compressed name at `at`, and where the next one begins. The length is one byte, or two
/// (ULEB128) when its top bit is set.
fn name_at(part: ImagePart<'_>, at: usize) -> Option<(&[u8], usize)> {
    let first = usize::from(*part.bytes.get(at)?);
    let (len, start) = if first & 0x80 == 0 {
        (first, at + 1)
    } else {
        let second = usize::from(*part.bytes.get(at + 1)?);
        (first & 0x7f | second << 7, at + 2)
    };
    if len == 0 || len > MAX_NAME {
        return None;
    }
    Some((part.get(start, len)?, start + len))
}

/// Decompresses a name into `out`. Its first character is the type. `None` when it is longer than a
/// name can be.
fn expand(tokens: &Tokens, compressed: &[u8], out: &mut String) -> Option<()> {
    out.clear();
    for &code in compressed {
        out.push_str(tokens.tokens.get(usize::from(code))?);
        if out.len() > MAX_EXPANDED {
            return None;
        }
    }
    Some(())
}

/// Where the addresses are and how they are encoded: the first combination in which `_text` is
/// `base`.
fn addresses(
    part: ImagePart<'_>,
    base: Gva,
    tokens: &Tokens,
    names: &Names,
    steps: &Steps,
) -> Option<(usize, Encoding)> {
    let text = position(part, tokens, names, steps)?;
    let after = tokens.index + TOKENS * 2;
    let table = names.count.checked_mul(4)?;
    let mut candidates = Vec::new();
    for offsets in [after, after.next_multiple_of(8)] {
        let based = part.u64((offsets + table).next_multiple_of(8));
        candidates.extend(based.map(|base| (offsets, Encoding::AbsolutePerCpu(base))));
        candidates.extend(based.map(|base| (offsets, Encoding::Based(base))));
        candidates.push((offsets, Encoding::Relative));
    }
    if let Some(at) = names.num_syms.checked_sub(8) {
        let offsets = at.checked_sub(table).map(|start| start / 8 * 8);
        let based = offsets.zip(part.u64(at));
        candidates.extend(based.map(|(offsets, base)| (offsets, Encoding::AbsolutePerCpu(base))));
        candidates.extend(based.map(|(offsets, base)| (offsets, Encoding::Based(base))));
    }
    candidates
        .into_iter()
        .find(|&(offsets, encoding)| address(part, offsets, encoding, text) == Some(base))
}

/// The position of `_text` among the names.
fn position(part: ImagePart<'_>, tokens: &Tokens, names: &Names, steps: &Steps) -> Option<usize> {
    let mut at = names.names;
    let mut name = String::new();
    for n in 0..names.count {
        let (compressed, next) = name_at(part, at)?;
        at = next;
        expand(tokens, compressed, &mut name)?;
        steps.take(name.len())?;
        if name.get(1..) == Some("_text") {
            return Some(n);
        }
    }
    None
}

/// The address of symbol `n`, as `kernel/kallsyms.c: kallsyms_sym_address`.
fn address(part: ImagePart<'_>, offsets: usize, encoding: Encoding, n: usize) -> Option<Gva> {
    let at = offsets.checked_add(n.checked_mul(4)?)?;
    let raw = part.u32(at)?;
    let signed = i64::from(raw.cast_signed());
    Some(match encoding {
        Encoding::AbsolutePerCpu(base) if signed < 0 => {
            Gva(base).sub(1).offset(signed.wrapping_neg())
        }
        Encoding::AbsolutePerCpu(_) => Gva(u64::from(raw)),
        Encoding::Based(base) => Gva(base).add(u64::from(raw)),
        Encoding::Relative => part.gva(at).offset(signed),
    })
}

fn collect(
    part: ImagePart<'_>,
    image: GvaRange,
    tokens: &Tokens,
    names: &Names,
    (offsets, encoding): (usize, Encoding),
    steps: &Steps,
) -> Option<Symbols> {
    // The most that there may be, so that it never grows: what is not used costs nothing, and is
    // freed.
    let mut builder = Builder::with_capacity(names.count, MAX_NAMES);
    let mut at = names.names;
    let mut name = String::new();
    let mut end = image.start;
    let mut bytes_left = MAX_NAMES;
    for n in 0..names.count {
        let (compressed, next) = name_at(part, at)?;
        at = next;
        expand(tokens, compressed, &mut name)?;
        let letter = *name.as_bytes().first()?;
        let gva = address(part, offsets, encoding, n)?;
        let bare = name.get(1..)?;
        if bare == "_end" {
            end = gva;
        }
        bytes_left = bytes_left.checked_sub(bare.len())?;
        steps.take(name.len() + SORT)?;
        builder.push(gva, letter, bare)?;
    }
    // Without a symbol `_end`, take what the page tables show.
    let end = if end > image.start { end } else { image.end };
    builder.build(GvaRange::new(image.start, end))
}

#[cfg(test)]
mod tests;
