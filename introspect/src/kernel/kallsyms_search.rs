//! Searches kernel images for kallsyms, a piece at a time: the memory that is held at once and the
//! cost of the whole search are bounded.
//!
//! This module knows where in an image the tables can be and how far apart. What they look like is
//! the business of [`kallsyms`].

use vm_memory::GuestAddress;

use crate::addr::{Gva, GvaRange};
use crate::kernel::locate::Candidate;
use crate::memory::PhysMemory;
use crate::memory::kernel::KernelMemory;
use crate::symbols::Symbols;
use crate::symbols::kallsyms::{self, DIGITS, ImagePart, KallsymsError, Steps};

/// Bytes of the image that are read at a time.
const CHUNK: usize = 2 << 20;
/// The most bytes of other tables before the token table, and as many after it; stock kernels have
/// about 5 MiB.
const TABLES: usize = 10 << 20;
/// The most bytes of tables after the token table of a stock kernel: enough for the first attempt,
/// and a second one is seldom needed.
const STOCK_TABLES: usize = 2 << 20;
/// Bytes that have been searched are dropped when there are this many.
const MIN_DROPPED: usize = 2 * CHUNK;
/// The most bytes of all images together that are searched: a hostile guest can show several, of
/// any size. The data of an honest image have some 40 MiB, and kallsyms is in their first half.
const MAX_SEARCHED: usize = 128 << 20;

/// What is left of the budget for all images of a guest.
#[derive(Debug)]
pub(crate) struct Search {
    steps: Steps,
    bytes: usize,
}

impl Search {
    pub(crate) fn new() -> Search {
        Search {
            steps: Steps::new(),
            bytes: MAX_SEARCHED,
        }
    }

    /// Reads the image's data, which begin where its code ends, until kallsyms is in what was read.
    pub(crate) fn symbols(
        &mut self,
        phys: &dyn PhysMemory,
        candidate: Candidate,
    ) -> Result<Symbols, KallsymsError> {
        let image = GvaRange::new(candidate.base, candidate.end);
        let mut at = data(phys, candidate);
        let mut piece = Piece::new(at);
        let mut error = KallsymsError::NoTokens;
        let mut after = STOCK_TABLES;
        loop {
            let distance = at.since(candidate.base);
            let gpa = GuestAddress(candidate.phys.0.wrapping_add(distance));
            let more = at < candidate.end && self.take_chunk() && piece.append(phys, gpa);
            at = at.add(CHUNK as u64);
            if let Some(hit) = piece.hit(more, after) {
                match kallsyms::parse_from(piece.part(), image, hit, &self.steps) {
                    Ok(symbols) => return Ok(symbols),
                    Err(found) => error = found,
                }
                if after == TABLES {
                    piece.reject(hit);
                }
                // Once in an image: reading little pays off where it is enough.
                after = TABLES;
            }
            if !more || error == KallsymsError::Endless {
                return Err(error);
            }
            piece.drop_searched();
        }
    }

    /// Takes one chunk from the budget; false when that is spent.
    fn take_chunk(&mut self) -> bool {
        let left = self.bytes.checked_sub(CHUNK);
        self.bytes = left.unwrap_or_default();
        left.is_some()
    }
}

/// The address at which the image's data begin.
fn data(phys: &dyn PhysMemory, candidate: Candidate) -> Gva {
    let memory = KernelMemory::new(phys, candidate.space);
    let code = |gva| {
        let mapping = memory.translate(gva);
        mapping.is_ok_and(|mapping| mapping.executable)
    };
    let mut start = candidate.base;
    while start < candidate.end && code(start) {
        start = start.add(CHUNK as u64);
    }
    // Until the kernel write-protects itself, the whole image is executable.
    if start < candidate.end {
        start
    } else {
        candidate.base
    }
}

/// The piece of an image that is held.
struct Piece {
    start: Gva,
    bytes: Vec<u8>,
    /// Tables that begin before this offset have been tried.
    searched: usize,
}

impl Piece {
    fn new(start: Gva) -> Piece {
        Piece {
            start,
            bytes: Vec::with_capacity(2 * TABLES + MIN_DROPPED + 2 * CHUNK),
            searched: 0,
        }
    }

    fn part(&self) -> ImagePart<'_> {
        ImagePart {
            start: self.start,
            bytes: &self.bytes,
        }
    }

    /// Reads the next chunk; false when there is no memory.
    fn append(&mut self, phys: &dyn PhysMemory, gpa: GuestAddress) -> bool {
        let len = self.bytes.len();
        self.bytes.resize(len + CHUNK, 0);
        let read = self.bytes.get_mut(len..).map(|chunk| phys.read(gpa, chunk));
        let is_there = matches!(read, Some(Ok(())));
        if !is_there {
            self.bytes.truncate(len);
        }
        is_there
    }

    /// The offset of a token table's digits, once `after` bytes that follow it are here too, or no
    /// more can be read.
    fn hit(&mut self, more: bool, after: usize) -> Option<usize> {
        let Some(hit) = kallsyms::digits(&self.bytes, self.searched) else {
            self.searched = self
                .searched
                .max(self.bytes.len().saturating_sub(DIGITS.len()));
            return None;
        };
        self.searched = hit;
        (!more || hit + after <= self.bytes.len()).then_some(hit)
    }

    /// Records that the digits at `hit`, and all others here that have their tables here too, are
    /// of no kallsyms.
    fn reject(&mut self, hit: usize) {
        self.searched = (hit + 1).max(self.bytes.len().saturating_sub(TABLES));
    }

    /// Drops bytes that no table can need any more.
    fn drop_searched(&mut self) {
        let old = self.searched.saturating_sub(TABLES) / CHUNK * CHUNK;
        if old >= MIN_DROPPED {
            self.bytes.drain(..old);
            self.searched -= old;
            self.start = self.start.add(old as u64);
        }
    }
}
