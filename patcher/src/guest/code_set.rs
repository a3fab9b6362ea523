//! A set of code ranges with names, for looking whether a stack has a frame in any of them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;

use introspect::task_list::TaskCache;
use introspect::{Frame, GvaRange, Stack};

/// Code that a task must not be in, each piece with its name.
#[derive(Clone, Debug, Default)]
pub struct CodeSet {
    pieces: Vec<(GvaRange, String)>,
    /// A number that a watch over other code does not have.
    id: Option<NonZeroU64>,
}

impl CodeSet {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> CodeSet {
        CodeSet::default()
    }

    /// Adds a piece of code.
    pub fn add(&mut self, code: GvaRange, name: impl Into<String>) {
        let mut hasher = DefaultHasher::new();
        (self.id, code.start, code.end).hash(&mut hasher);
        self.id = NonZeroU64::new(hasher.finish());
        self.pieces.push((code, name.into()));
    }

    /// Marks everybody whose stack is known already to be free of this code, ahead of a look.
    pub fn tag_ahead(&self, task_cache: &mut TaskCache) {
        task_cache.tag(self.mark(), |stack| self.first_frame_in(stack).is_none());
    }

    pub(super) fn mark(&self) -> NonZeroU64 {
        self.id.unwrap_or(NonZeroU64::MIN)
    }

    /// The piece that `frame` is in.
    #[must_use]
    pub fn hit(&self, frame: &Frame) -> Option<&str> {
        let (_, name) = self.pieces.iter().find(|(code, _)| frame.is_in(code))?;
        Some(name)
    }

    /// The first frame of `stack` in any of the pieces, with the piece's name.
    #[must_use]
    pub fn first_frame_in<'s>(&self, stack: &'s Stack) -> Option<(&'s Frame, &str)> {
        stack
            .frames
            .iter()
            .find_map(|frame| Some((frame, self.hit(frame)?)))
    }
}
