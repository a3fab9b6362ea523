//! Looks for kallsyms in kernel images, a piece at a time: what is held at once, and what all of it costs, have bounds.
//!
//! Knows where in an image the tables can be and how far apart; what they look like, [`kallsyms`](crate::symbols::kallsyms) knows.

use vm_memory::GuestAddress;

use crate::addr::{Gva, GvaRange};
use crate::kernel::locate::Candidate;
use crate::memory::PhysMemory;
use crate::memory::kernel::KernelMemory;
use crate::symbols::Symbols;
use crate::symbols::kallsyms::{self, DIGITS, KallsymsError, Steps, Window};

/// The image is read so much at a time.
const CHUNK: usize = 2 << 20;
/// In front of the token table, and behind it, come at most so many bytes of other tables; stock kernels have about 5 MiB.
const TABLES: usize = 10 << 20;
/// Behind the token table of a stock kernel come no more than so many bytes: enough for the first look, which seldom needs another.
const STOCK_TABLES: usize = 2 << 20;
/// What has been searched is forgotten when it is so much.
const FORGET: usize = 2 * CHUNK;
/// So much of all images together is searched: a hostile guest can show several, as large as it likes. The data of one that is
/// honest have some 40 MiB, and kallsyms is in their first half.
const MAX_SEARCHED: usize = 128 << 20;

/// What the search through all images of a guest has left.
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
        let mut behind = STOCK_TABLES;
        loop {
            let distance = at.since(candidate.base);
            let gpa = GuestAddress(candidate.phys.0.wrapping_add(distance));
            let more = at < candidate.end && self.afford() && piece.append(phys, gpa);
            at = at.add(CHUNK as u64);
            if let Some(hit) = piece.hit(more, behind) {
                match kallsyms::parse_from(piece.window(), image, hit, &self.steps) {
                    Ok(symbols) => return Ok(symbols),
                    Err(found) => error = found,
                }
                if behind == TABLES {
                    piece.pass(hit);
                }
                behind = TABLES; // once in an image: to read little pays where it is enough
            }
            if !more || error == KallsymsError::Endless {
                return Err(error);
            }
            piece.forget();
        }
    }

    /// Whether one more chunk may be searched.
    fn afford(&mut self) -> bool {
        let left = self.bytes.checked_sub(CHUNK);
        self.bytes = left.unwrap_or_default();
        left.is_some()
    }
}

/// Where the image's data begin.
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
    // Before the kernel protects itself, all of it is executable.
    if start < candidate.end {
        start
    } else {
        candidate.base
    }
}

/// The piece of an image that is at hand.
struct Piece {
    start: Gva,
    bytes: Vec<u8>,
    /// What begins before this has been looked at.
    searched: usize,
}

impl Piece {
    fn new(start: Gva) -> Piece {
        Piece {
            start,
            bytes: Vec::with_capacity(2 * TABLES + FORGET + 2 * CHUNK),
            searched: 0,
        }
    }

    fn window(&self) -> Window<'_> {
        Window {
            start: self.start,
            bytes: &self.bytes,
        }
    }

    /// Reads the next chunk; false when there is no memory there.
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

    /// Digits of a token table, once so much `behind` it is here too, or all that there is.
    fn hit(&mut self, more: bool, behind: usize) -> Option<usize> {
        let Some(hit) = kallsyms::digits(&self.bytes, self.searched) else {
            self.searched = self
                .searched
                .max(self.bytes.len().saturating_sub(DIGITS.len()));
            return None;
        };
        self.searched = hit;
        (!more || hit + behind <= self.bytes.len()).then_some(hit)
    }

    /// The digits at `hit` and all others here are of no kallsyms, as far as the tables behind them are here.
    fn pass(&mut self, hit: usize) {
        self.searched = (hit + 1).max(self.bytes.len().saturating_sub(TABLES));
    }

    /// Lets go of what no table can need any more.
    fn forget(&mut self) {
        let old = self.searched.saturating_sub(TABLES) / CHUNK * CHUNK;
        if old >= FORGET {
            self.bytes.drain(..old);
            self.searched -= old;
            self.start = self.start.add(old as u64);
        }
    }
}
