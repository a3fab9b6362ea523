//! A set of named code ranges, and the search for a stack frame in any of them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;

use introspect::task_list::TaskCache;
use introspect::{Frame, GvaRange, Stack};

/// What a range of code is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CodeName {
    /// A function of the kernel, or a part of it that lies elsewhere.
    Kernel(String),
    /// A function of a patch.
    Function {
        /// The function.
        name: String,
        /// The patch.
        patch: String,
    },
    /// The entry stubs of this patch.
    Stubs(String),
    /// All code of this patch.
    Patch(String),
}

/// Code that a task must not be in, as ranges with names.
#[derive(Clone, Debug, Default)]
pub struct CodeSet {
    ranges: Vec<(GvaRange, CodeName)>,
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
    pub fn add(&mut self, code: GvaRange, name: CodeName) {
        let mut hasher = DefaultHasher::new();
        (self.id, code.start, code.end).hash(&mut hasher);
        self.id = NonZeroU64::new(hasher.finish());
        self.ranges.push((code, name));
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

    /// The range that `frame` is in.
    fn find(&self, frame: &Frame) -> Option<&(GvaRange, CodeName)> {
        self.ranges.iter().find(|(code, _)| frame.is_in(code))
    }

    /// The first frame of `stack` that is in any of the ranges, with the range and its name.
    #[must_use]
    pub fn first_frame_in<'s>(
        &self,
        stack: &'s Stack,
    ) -> Option<(&'s Frame, &(GvaRange, CodeName))> {
        stack
            .frames
            .iter()
            .find_map(|frame| Some((frame, self.find(frame)?)))
    }
}
