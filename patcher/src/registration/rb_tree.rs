//! Red-black trees of the guest (`lib/rbtree.c`): reads one in order, and builds a balanced one.
//!
//! This module knows links and colours; it must not know what the nodes are, or how they are
//! ordered. It writes nothing.

use introspect::{Gva, KernelMemory};

use crate::error::{StepError, unexpected};
use crate::registration::layout::RbNodeLayout;

/// The most levels of a tree: a red-black tree of 2^31 nodes has no more.
const MAX_DEPTH: usize = 64;
/// The colour bit of `__rb_parent_color` (`include/linux/rbtree_augmented.h: RB_BLACK`).
const BLACK: u64 = 1;

/// A node and its links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RbNode {
    /// Its address.
    pub at: Gva,
    /// The address of its parent, null for the root, with the colour in the lowest bit.
    pub parent_color: u64,
    /// Its left child, or null.
    pub left: Gva,
    /// Its right child, or null.
    pub right: Gva,
}

/// The nodes of the tree whose root pointer is at `root`, in order; at most `max`.
///
/// # Errors
/// [`StepError::Failed`] when the tree cannot be read, or is none.
pub fn in_order(
    memory: &KernelMemory<'_>,
    layout: &RbNodeLayout,
    root: Gva,
    max: usize,
) -> Result<Vec<RbNode>, StepError> {
    let mut nodes: Vec<RbNode> = Vec::new();
    let mut above: Vec<RbNode> = Vec::new();
    let mut next = memory.pointer(root)?;
    loop {
        while !next.is_null() {
            if above.len() >= MAX_DEPTH {
                return Err(broken(root, "is deeper than a tree of its kind can be"));
            }
            let node = read(memory, layout, next)?;
            above.push(node);
            next = node.left;
        }
        let Some(node) = above.pop() else {
            return Ok(nodes);
        };
        if nodes.len() >= max {
            return Err(broken(root, "has more nodes than all modules can have"));
        }
        nodes.push(node);
        next = node.right;
    }
}

fn read(memory: &KernelMemory<'_>, layout: &RbNodeLayout, at: Gva) -> Result<RbNode, StepError> {
    Ok(RbNode {
        at,
        parent_color: memory.u64(layout.parent_color.of(at))?,
        left: memory.pointer(layout.left.of(at))?,
        right: memory.pointer(layout.right.of(at))?,
    })
}

fn broken(root: Gva, why: &str) -> StepError {
    StepError::Failed(unexpected(format!(
        "the guest's tree of modules (mod_tree, root at {root}) {why}"
    )))
}

/// A balanced tree of the nodes at these addresses, in this order. Returns the root, null when there
/// is none, and the nodes in the same order.
///
/// All levels that are complete are black and the last, incomplete one is red, so that every path
/// has as many black nodes and no red node has a red child.
#[must_use]
pub fn balanced(addresses: &[Gva]) -> (Gva, Vec<RbNode>) {
    let black_levels = (addresses.len() + 1).ilog2();
    let mut nodes: Vec<RbNode> = (addresses.iter())
        .map(|at| RbNode {
            at: *at,
            parent_color: 0,
            left: Gva::NULL,
            right: Gva::NULL,
        })
        .collect();
    let middle = |(start, end): (usize, usize)| (start < end).then(|| start.midpoint(end));
    let at = |index: Option<usize>| index.and_then(|index| addresses.get(index));
    let at = |index| at(index).copied().unwrap_or_default();
    let mut parts = vec![((0, addresses.len()), Gva::NULL, 0)];
    while let Some(((start, end), parent, level)) = parts.pop() {
        let Some(index) = middle((start, end)) else {
            continue;
        };
        let (before, after) = ((start, index), (index + 1, end));
        if let Some(node) = nodes.get_mut(index) {
            let color = if level < black_levels { BLACK } else { 0 };
            node.parent_color = parent.0 | color;
            node.left = at(middle(before));
            node.right = at(middle(after));
            parts.push((before, node.at, level + 1));
            parts.push((after, node.at, level + 1));
        }
    }
    (at(middle((0, addresses.len()))), nodes)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// Checks the subtree at `at`; returns its black height and its addresses in order.
    fn check(nodes: &HashMap<Gva, RbNode>, at: Gva, parent: Option<&RbNode>) -> (u32, Vec<Gva>) {
        let Some(node) = nodes.get(&at) else {
            assert!(at.is_null());
            return (1, Vec::new());
        };
        assert_eq!(
            node.parent_color & !3,
            parent.map_or(0, |parent| parent.at.0)
        );
        let is_black = |node: &RbNode| node.parent_color & BLACK != 0;
        assert!(
            is_black(node) || parent.is_some_and(is_black),
            "red under red"
        );
        let (left, mut order) = check(nodes, node.left, Some(node));
        let (right, after) = check(nodes, node.right, Some(node));
        assert_eq!(left, right, "black heights");
        order.push(at);
        order.extend(after);
        (left + u32::from(is_black(node)), order)
    }

    proptest! {
        #[test]
        fn a_balanced_tree_is_a_red_black_tree(count in 0usize..400) {
            let addresses: Vec<Gva> = (1..=count).map(|i| Gva(i as u64 * 24)).collect();
            let (root, nodes) = balanced(&addresses);
            let nodes: HashMap<Gva, RbNode> = nodes.into_iter().map(|n| (n.at, n)).collect();
            let (_, order) = check(&nodes, root, None);
            prop_assert_eq!(order, addresses);
        }
    }
}
