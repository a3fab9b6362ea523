//! A set of named code ranges, and the search for a stack frame in any of them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;

use introspect::task_list::TaskCache;
use introspect::{Frame, GvaRange, Stack};

/// Code that a task must not be in, as ranges with names.
#[derive(Clone, Debug, Default)]
pub struct CodeSet {
    ranges: Vec<(GvaRange, String)>,
    /// A hash of the ranges, which tells this set from others.
    id: Option<NonZeroU64>,
}

impl CodeSet {
    /// An empty set.
    #[must_use]
    pub fn new() -> CodeSet {
        CodeSet::default()
    }

    /// Adds a range of code.
    pub fn add(&mut self, code: GvaRange, name: impl Into<String>) {
        let mut hasher = DefaultHasher::new();
        (self.id, code.start, code.end).hash(&mut hasher);
        self.id = NonZeroU64::new(hasher.finish());
        self.ranges.push((code, name.into()));
    }

    /// Tags, before a pause, the tasks whose cached stacks are free of this code: their check in
    /// the pause need not search the stack.
    pub fn tag_clear_tasks(&self, task_cache: &mut TaskCache) {
        task_cache.tag(self.id(), |stack| self.first_frame_in(stack).is_none());
    }

    /// The tag of tasks that are clear of this code.
    pub(super) fn id(&self) -> NonZeroU64 {
        self.id.unwrap_or(NonZeroU64::MIN)
    }

    /// The name of the range that `frame` is in.
    #[must_use]
    pub fn find(&self, frame: &Frame) -> Option<&str> {
        let (_, name) = self.ranges.iter().find(|(code, _)| frame.is_in(code))?;
        Some(name)
    }

    /// The first frame of `stack` that is in any of the ranges, with the name of the range.
    #[must_use]
    pub fn first_frame_in<'s>(&self, stack: &'s Stack) -> Option<(&'s Frame, &str)> {
        stack
            .frames
            .iter()
            .find_map(|frame| Some((frame, self.find(frame)?)))
    }
}
