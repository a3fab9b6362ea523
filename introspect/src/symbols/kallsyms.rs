//! kallsyms in guest memory: found by its structure, in every layout from 5.10 to 7.x.
//!
//! `scripts/kallsyms.c` writes these tables into the kernel's read-only data, each at a label:
//! - up to 6.3: offsets, relative_base, num_syms, names, markers, (seqs_of_names), token_table, token_index;
//! - 6.4 on: num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs_of_names;
//! - 7.x: the same without relative_base: each offset is relative to its own address.
//!
//! No version decides which it is: the token table is recognised by its digits, the tables around it by how they fit each other,
//! and the way to addresses by `_text` coming out as the base of the image that the page tables show.

use std::cell::Cell;

use crate::addr::{Gva, GvaRange};
use crate::symbols::Builder;
pub use crate::symbols::{Symbol, SymbolError, Symbols};

/// Tokens, one for each value of a byte.
const TOKENS: usize = 256;
/// No generation comes near so many symbols: stock kernels have about 200,000.
const MAX_SYMBOLS: u32 = 1 << 19;
/// The token table is at most this long: 256 tokens, few of them over 16 bytes.
const MAX_TOKEN_TABLE: usize = 8192;
/// A compressed name has at most this many bytes (`KSYM_NAME_LEN` is 512).
const MAX_NAME: usize = 1024;
/// A name has at most this many characters. Each of its bytes can stand for a token of any length.
const MAX_EXPANDED: usize = 1024;
/// All names together, in characters; stock kernels have about 5 MiB.
const MAX_NAMES: usize = 16 << 20;
/// Steps to find the tables and to read them, in bytes and words looked at: some ten times what an honest kernel takes. Places that look
/// like tables and are none can lie as close together as a guest likes, and each costs a search of its own.
const MAX_STEPS: usize = 1 << 27;
/// Steps that one symbol costs when all are sorted.
const SORT: usize = 20;
/// One marker for so many names.
const MARKED: usize = 256;
/// What 256 names take: more than two bytes each, less than this.
const MARKER_STEP: std::ops::Range<u32> = 0x200..0x10000;
/// A kernel has many more symbols than this times 256; a run of rising numbers seldom is so long.
const MIN_MARKERS: usize = 64;
/// Labels are at least so aligned.
const ALIGN: usize = 4;
/// `"0\0" "1\0" … "9\0"`: digits are never part of a longer token, so these tokens are always so.
pub(crate) const DIGITS: [u8; 20] = *b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";

/// Why there are no symbols.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KallsymsError {
    /// No token table with its index.
    #[error("no kallsyms token table in the kernel's read-only data")]
    NoTokens,
    /// A token table, but no names in front of it that its markers fit.
    #[error("kallsyms token table at {0}, but no symbol names that fit it")]
    NoNames(Gva),
    /// Too many places look like tables and are none.
    #[error("the kernel's read-only data are full of what looks like kallsyms tables")]
    Endless,
    /// Names, but no way to addresses that puts `_text` where the image begins.
    #[error("kallsyms names at {0}, but no table of addresses that fits them")]
    NoAddresses(Gva),
}

/// A part of the kernel image, copied out of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Window<'b> {
    /// Where it begins.
    pub start: Gva,
    /// Its bytes.
    pub bytes: &'b [u8],
}

impl<'b> Window<'b> {
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

/// The token table and the index behind it.
#[derive(Debug)]
struct Tokens {
    /// Offset of the table in the window.
    table: usize,
    /// Offset of the index in the window.
    index: usize,
    /// The tokens.
    tokens: Vec<String>,
}

/// The names and their count.
#[derive(Debug)]
struct Names {
    /// Offset of `kallsyms_num_syms`.
    num_syms: usize,
    /// Offset of `kallsyms_names`.
    names: usize,
    count: usize,
}

/// What is left of [`MAX_STEPS`].
#[derive(Debug)]
pub(crate) struct Steps(Cell<usize>);

impl Steps {
    pub(crate) fn new() -> Steps {
        Steps(Cell::new(MAX_STEPS))
    }

    /// Takes so many; `None` when none are left, then and from then on.
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
    /// `CONFIG_KALLSYMS_ABSOLUTE_PERCPU`: not negative is absolute; negative is `base - 1 - offset`.
    AbsolutePerCpu(u64),
    /// Unsigned, from the base.
    Based(u64),
    /// Signed, from the entry's own address.
    Relative,
}

/// The offset of the first token-table digits at or behind `from`.
#[must_use]
pub fn digits(bytes: &[u8], from: usize) -> Option<usize> {
    // Like Horspool's, but by the last two bytes under the pattern: images have much more of zeroes than of digits.
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

/// Reads every symbol out of `window`, which holds the image's read-only data. `image` is what the kernel covers.
///
/// # Errors
/// [`KallsymsError`], naming the table that was found last.
pub fn parse(window: Window<'_>, image: GvaRange) -> Result<Symbols, KallsymsError> {
    parse_from(window, image, 0, &Steps::new())
}

/// The same, for token tables whose digits begin at or behind `from`.
pub(crate) fn parse_from(
    window: Window<'_>,
    image: GvaRange,
    mut from: usize,
    steps: &Steps,
) -> Result<Symbols, KallsymsError> {
    let mut error = KallsymsError::NoTokens;
    while let Some(hit) = digits(window.bytes, from) {
        from = hit + 1;
        if let Some(tokens) = Tokens::find(window, hit, steps) {
            match parse_with(window, image, &tokens, steps) {
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
    window: Window<'_>,
    image: GvaRange,
    tokens: &Tokens,
    steps: &Steps,
) -> Result<Symbols, KallsymsError> {
    let names = Names::find(window, tokens, steps)
        .ok_or(KallsymsError::NoNames(window.gva(tokens.table)))?;
    addresses(window, image.start, tokens, &names, steps)
        .and_then(|addresses| collect(window, image, tokens, &names, addresses, steps))
        .ok_or(KallsymsError::NoAddresses(window.gva(names.names)))
}

impl Tokens {
    /// The table whose token for `'0'` is at `hit`: its index lies behind it, at one of the next labels.
    fn find(window: Window<'_>, hit: usize, steps: &Steps) -> Option<Tokens> {
        let first = (hit + DIGITS.len()).next_multiple_of(ALIGN);
        (first..hit + MAX_TOKEN_TABLE)
            .step_by(ALIGN)
            .map_while(|index| steps.take(1).map(|()| index))
            .find_map(|index| Tokens::with_index(window, hit, index, steps))
    }

    fn with_index(window: Window<'_>, hit: usize, index: usize, steps: &Steps) -> Option<Tokens> {
        let raw = window.get(index, TOKENS * 2)?;
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
            if start != 0 && window.bytes.get(at - 1) != Some(&0) {
                return None;
            }
            let rest = window.bytes.get(at..index)?;
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
    /// Markers lie somewhere in front of the token table (6.1 has a table between them), names end where markers begin.
    fn find(window: Window<'_>, tokens: &Tokens, steps: &Steps) -> Option<Names> {
        let mut at = tokens.table / ALIGN * ALIGN;
        while let Some(next) = at.checked_sub(ALIGN) {
            at = next;
            steps.take(1)?;
            // Every table of markers begins with 0.
            if window.u32(at) != Some(0) {
                continue;
            }
            let markers = markers_at(window, at, tokens.table);
            steps.take(markers.len())?;
            if markers.len() < MIN_MARKERS {
                continue;
            }
            if let Some(names) = Names::before(window, at, &markers, steps) {
                return Some(names);
            }
        }
        None
    }

    /// The names that end at `end`, where `markers` begin.
    fn before(window: Window<'_>, end: usize, markers: &[u32], steps: &Steps) -> Option<Names> {
        let last = usize::try_from(*markers.last()?).ok()?;
        let most = u32::try_from(markers.len().checked_mul(MARKED)?).ok()?;
        let least = most.saturating_sub(255);
        // The names behind the last marker take something between nothing and a step.
        let top = end.checked_sub(last)? / ALIGN * ALIGN;
        let bottom = top.saturating_sub(MARKER_STEP.end as usize);
        for num_syms in (bottom..top).step_by(ALIGN).rev() {
            steps.take(1)?;
            let count = window.u32(num_syms)?;
            if !(least..=most).contains(&count) || count > MAX_SYMBOLS {
                continue;
            }
            for names in [num_syms + 4, num_syms + 8] {
                let found = Names {
                    num_syms,
                    names,
                    count: usize::try_from(count).ok()?,
                };
                if found.fit(window, end, markers, steps) {
                    return Some(found);
                }
            }
        }
        None
    }

    /// Whether the names end at `end`, and the markers point to every 256th.
    fn fit(&self, window: Window<'_>, end: usize, markers: &[u32], steps: &Steps) -> bool {
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
            match name_at(window, at) {
                Some((_, next)) if next <= end => at = next,
                _ => return false,
            }
        }
        end - at < 8
    }
}

/// The rising run of markers at `at`; no longer than symbols can need. It never passes a 0, where another table may begin: what
/// is looked at for one is not looked at again for the next.
fn markers_at(window: Window<'_>, at: usize, end: usize) -> Vec<u32> {
    let mut markers: Vec<u32> = Vec::new();
    let Some(words) = window.u32s(at, (end - at) / 4) else {
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

/// The compressed name at `at`, and where the next one begins. The length is one byte, or two (ULEB128) when its top bit is set.
fn name_at(window: Window<'_>, at: usize) -> Option<(&[u8], usize)> {
    let first = usize::from(*window.bytes.get(at)?);
    let (len, start) = if first & 0x80 == 0 {
        (first, at + 1)
    } else {
        let second = usize::from(*window.bytes.get(at + 1)?);
        (first & 0x7f | second << 7, at + 2)
    };
    if len == 0 || len > MAX_NAME {
        return None;
    }
    Some((window.get(start, len)?, start + len))
}

/// Decompresses a name into `out`: its first character is the type. `None` when it is longer than a name can be.
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

/// Where the addresses are and how they are encoded: the first way in which `_text` is `base`.
fn addresses(
    window: Window<'_>,
    base: Gva,
    tokens: &Tokens,
    names: &Names,
    steps: &Steps,
) -> Option<(usize, Encoding)> {
    let text = position(window, tokens, names, steps)?;
    let behind = tokens.index + TOKENS * 2;
    let table = names.count.checked_mul(4)?;
    let mut candidates = Vec::new();
    for offsets in [behind, behind.next_multiple_of(8)] {
        let based = window.u64((offsets + table).next_multiple_of(8));
        candidates.extend(based.map(|base| (offsets, Encoding::AbsolutePerCpu(base))));
        candidates.extend(based.map(|base| (offsets, Encoding::Based(base))));
        candidates.push((offsets, Encoding::Relative));
    }
    if let Some(at) = names.num_syms.checked_sub(8) {
        let offsets = at.checked_sub(table).map(|start| start / 8 * 8);
        let based = offsets.zip(window.u64(at));
        candidates.extend(based.map(|(offsets, base)| (offsets, Encoding::AbsolutePerCpu(base))));
        candidates.extend(based.map(|(offsets, base)| (offsets, Encoding::Based(base))));
    }
    candidates
        .into_iter()
        .find(|&(offsets, encoding)| address(window, offsets, encoding, text) == Some(base))
}

/// The position of `_text` among the names.
fn position(window: Window<'_>, tokens: &Tokens, names: &Names, steps: &Steps) -> Option<usize> {
    let mut at = names.names;
    let mut name = String::new();
    for n in 0..names.count {
        let (compressed, next) = name_at(window, at)?;
        at = next;
        expand(tokens, compressed, &mut name)?;
        steps.take(name.len())?;
        if name.get(1..) == Some("_text") {
            return Some(n);
        }
    }
    None
}

/// `kernel/kallsyms.c: kallsyms_sym_address`, for the encoding.
fn address(window: Window<'_>, offsets: usize, encoding: Encoding, n: usize) -> Option<Gva> {
    let at = offsets.checked_add(n.checked_mul(4)?)?;
    let raw = window.u32(at)?;
    let signed = i64::from(raw.cast_signed());
    Some(match encoding {
        Encoding::AbsolutePerCpu(base) if signed < 0 => {
            Gva(base).sub(1).offset(signed.wrapping_neg())
        }
        Encoding::AbsolutePerCpu(_) => Gva(u64::from(raw)),
        Encoding::Based(base) => Gva(base).add(u64::from(raw)),
        Encoding::Relative => window.gva(at).offset(signed),
    })
}

fn collect(
    window: Window<'_>,
    image: GvaRange,
    tokens: &Tokens,
    names: &Names,
    (offsets, encoding): (usize, Encoding),
    steps: &Steps,
) -> Option<Symbols> {
    // As much as there may be, so that it never grows: what is not used costs nothing, and is given back.
    let mut builder = Builder::with_capacity(names.count, MAX_NAMES);
    let mut at = names.names;
    let mut name = String::new();
    let mut end = image.start;
    let mut room = MAX_NAMES;
    for n in 0..names.count {
        let (compressed, next) = name_at(window, at)?;
        at = next;
        expand(tokens, compressed, &mut name)?;
        let letter = *name.as_bytes().first()?;
        let gva = address(window, offsets, encoding, n)?;
        let bare = name.get(1..)?;
        if bare == "_end" {
            end = gva;
        }
        room = room.checked_sub(bare.len())?;
        steps.take(name.len() + SORT)?;
        builder.push(gva, letter, bare)?;
    }
    // Without `_end` among them, what the page tables show must do.
    let end = if end > image.start { end } else { image.end };
    builder.build(GvaRange::new(image.start, end))
}

#[cfg(test)]
mod tests;
