//! Walks a circular `struct list_head` of the guest (`include/linux/list.h: list_for_each_entry`).
//!
//! This module knows links and a bound; it must not know what the entries are. A list ends where it
//! leads back to its head. A cycle that leaves the head out, and a list that grows without end,
//! stop at the bound: nothing is allocated per entry to find them.

use crate::addr::Gva;
use crate::memory::kernel::{Field, KernelMemory, ReadError};

/// Why a walk over a list stopped before it came back to the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListError {
    /// A link cannot be read.
    Read(ReadError),
    /// The list does not lead back to its head within the bound.
    Endless,
}

/// The entries of one list, by the address of the structure that holds each link.
///
/// A link is read only when the entry after it is requested. Yields nothing more after an error.
pub(crate) struct ListEntries<'a, 'm> {
    memory: &'a KernelMemory<'m>,
    next: Field,
    link: Field,
    head: Gva,
    /// The link whose successor comes next; `None` after the end.
    node: Option<Gva>,
    left: usize,
}

impl<'a, 'm> ListEntries<'a, 'm> {
    /// The list at `head`, whose entries hold their `struct list_head` in `link`; at most `max`
    /// entries. `next` is `list_head.next`.
    pub(crate) fn new(
        memory: &'a KernelMemory<'m>,
        next: Field,
        head: Gva,
        link: Field,
        max: usize,
    ) -> ListEntries<'a, 'm> {
        ListEntries {
            memory,
            next,
            link,
            head,
            node: Some(head),
            left: max,
        }
    }

    /// The next entry, `None` at the head.
    fn advance(&mut self, node: Gva) -> Result<Option<Gva>, ListError> {
        let next = self
            .memory
            .pointer(self.next.of(node))
            .map_err(ListError::Read)?;
        if next == self.head {
            return Ok(None);
        }
        self.left = self.left.checked_sub(1).ok_or(ListError::Endless)?;
        self.node = Some(next);
        Ok(Some(self.link.container(next)))
    }
}

impl Iterator for ListEntries<'_, '_> {
    type Item = Result<Gva, ListError>;

    fn next(&mut self) -> Option<Self::Item> {
        let node = self.node.take()?;
        self.advance(node).transpose()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::paging::AddressSpace;
    use crate::testing::Ram;

    const NEXT: Field = Field { offset: 0, size: 8 };
    const LINK: Field = Field {
        offset: 0x10,
        size: 16,
    };

    /// Virtual 0..0x1000 is physical 0x5000..0x6000, and holds these links: (where, next).
    fn ram(links: &[(u64, u64)]) -> Ram {
        let mut ram = Ram::new(0x6000);
        for (at, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003)] {
            ram.u64(at, entry);
        }
        ram.u64(0x4000, 0x5003);
        for (at, next) in links {
            ram.u64(0x5000 + usize::try_from(*at).unwrap(), *next);
        }
        ram
    }

    fn walk(links: &[(u64, u64)], max: usize) -> Vec<Result<u64, ListError>> {
        let ram = ram(links);
        let root = GuestAddress(0x1000);
        let memory = KernelMemory::new(&ram, AddressSpace { root, levels: 4 });
        ListEntries::new(&memory, NEXT, Gva(0x100), LINK, max)
            .map(|entry| entry.map(|gva| gva.0))
            .collect()
    }

    #[test]
    fn a_list_ends_at_its_head() {
        assert_eq!(walk(&[(0x100, 0x100)], 0), []);
        let three = [
            (0x100, 0x210),
            (0x210, 0x310),
            (0x310, 0x410),
            (0x410, 0x100),
        ];
        let all = [Ok(0x200), Ok(0x300), Ok(0x400)];
        assert_eq!(walk(&three, 3), all);
        let short = [Ok(0x200), Ok(0x300), Err(ListError::Endless)];
        assert_eq!(walk(&three, 2), short);
    }

    #[test]
    fn a_cycle_beside_the_head_ends_at_the_bound() {
        let found = walk(&[(0x100, 0x210), (0x210, 0x210)], 50);
        assert_eq!(found.len(), 51);
        assert_eq!(found.last(), Some(&Err(ListError::Endless)));
    }

    #[test]
    fn a_link_that_cannot_be_read_is_the_last() {
        let found = walk(&[(0x100, 0x210), (0x210, 0x9000)], 50);
        assert_eq!(found[..2], [Ok(0x200), Ok(0x8ff0)]);
        assert!(matches!(found[2..], [Err(ListError::Read(error))] if error.gva == Gva(0x9000)));
    }
}
