//! The latch tree `mod_tree`, in which the kernel finds the module of an address
//! (`kernel/module/tree_lookup.c`).
//!
//! There are two trees with the same nodes, and a sequence count that tells readers which of them is
//! not being changed (`include/linux/rbtree_latch.h`). Readers take no lock, and search again when
//! the count has changed; all writers hold `module_mutex`. So while that is free and the guest is
//! paused, both trees can be replaced at once: the count rises by two, and readers see a state
//! between two of the kernel's own. A reader that is in the middle of a search ends it, as every
//! node only leads further down, and then searches again.
//!
//! This module plans; it writes nothing itself.

use std::collections::HashMap;

use introspect::{Field, Gva, GvaRange, KernelMemory};

use crate::error::{StepError, unexpected};
use crate::memory::PatchMemory;
use crate::memory::write_batch::WriteBatch;
use crate::registration::layout::TreeLayout;
use crate::registration::rb_tree::{self, RbNode};
use crate::registration::words::Words;

/// The most nodes: those of more modules than a guest loads, with up to seven ranges each.
const MAX_NODES: usize = 8192 * 7;

/// A range of a module's memory, and its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeNode {
    /// The address of its `struct latch_tree_node`.
    pub at: Gva,
    /// The range.
    pub range: GvaRange,
}

/// Plans trees without the nodes in `remove` and with those in `add`. The bounds of all addresses
/// grow with these, and never shrink, as in the kernel.
///
/// # Errors
/// [`StepError::Failed`] when the trees are not what the kernel's are, or lack a node in `remove`.
pub fn plan(
    memory: &KernelMemory<'_>,
    layout: &TreeLayout,
    patch_memory: &PatchMemory,
    (add, remove): (&[TreeNode], &[TreeNode]),
    writes: &mut WriteBatch,
) -> Result<(), StepError> {
    let old = read(memory, layout)?;
    let mut ranges = ranges(memory, layout, &old)?;
    for gone in remove {
        let position = ranges.iter().position(|node| node == gone);
        let position = position.ok_or_else(|| broken(format!("lacks the node at {}", gone.at)))?;
        ranges.remove(position);
    }
    for new in add {
        let position = ranges.partition_point(|node| node.range.start < new.range.start);
        ranges.insert(position, *new);
    }
    check_order(&ranges)?;
    for (tree, (root_at, old)) in layout.roots.into_iter().zip(&old).enumerate() {
        let shift = layout.rb_node.size * tree as u64;
        let addresses: Vec<Gva> = ranges.iter().map(|node| node.at.add(shift)).collect();
        let (root, nodes) = rb_tree::balanced(&addresses);
        let old: HashMap<Gva, &RbNode> = old.iter().map(|node| (node.at, node)).collect();
        let changed = |node: &&RbNode| old.get(&node.at) != Some(node);
        for node in nodes.iter().filter(changed) {
            let bytes = node_bytes(layout, node)?;
            patch_memory.plan_anywhere(memory, node.at, &bytes, writes)?;
        }
        writes.write_kernel(memory, root_at, &root.0.to_le_bytes())?;
    }
    plan_bounds(memory, layout, add, writes)?;
    let seq = memory.u32(layout.seq)?.wrapping_add(2);
    Ok(writes.write_kernel(memory, layout.seq, &seq.to_le_bytes())?)
}

/// The nodes of both trees, in order. Both must have the same ones.
fn read(memory: &KernelMemory<'_>, layout: &TreeLayout) -> Result<[Vec<RbNode>; 2], StepError> {
    let [first, second] = layout
        .roots
        .map(|root| rb_tree::in_order(memory, &layout.rb_node, root, MAX_NODES));
    let (first, second) = (first?, second?);
    let shifted = first.iter().map(|node| node.at.add(layout.rb_node.size));
    if !shifted.eq(second.iter().map(|node| node.at)) {
        return Err(broken("has two trees that differ"));
    }
    Ok([first, second])
}

/// The ranges of the nodes.
fn ranges(
    memory: &KernelMemory<'_>,
    layout: &TreeLayout,
    [nodes, _]: &[Vec<RbNode>; 2],
) -> Result<Vec<TreeNode>, StepError> {
    let (size_at, size) = layout.size;
    let of_node = |node: &RbNode| {
        let start = memory.pointer(node.at.offset(layout.base))?;
        let size = Field { offset: 0, ..size };
        let len = memory.field(node.at.offset(size_at), size)?;
        Ok(TreeNode {
            at: node.at,
            range: GvaRange::new(start, start.add(len)),
        })
    };
    nodes.iter().map(of_node).collect()
}

/// Checks that the ranges are in order and do not overlap.
fn check_order(ranges: &[TreeNode]) -> Result<(), StepError> {
    for (before, after) in ranges.iter().zip(ranges.iter().skip(1)) {
        if before.range.end > after.range.start || before.range.is_empty() {
            return Err(broken(format!(
                "has the ranges from {} and from {}, which overlap or are not in order",
                before.range.start, after.range.start
            )));
        }
    }
    Ok(())
}

fn node_bytes(layout: &TreeLayout, node: &RbNode) -> Result<Vec<u8>, StepError> {
    let mut words = Words::new(layout.rb_node.size)?;
    words.set(layout.rb_node.parent_color, node.parent_color)?;
    words.set(layout.rb_node.left, node.left.0)?;
    words.set(layout.rb_node.right, node.right.0)?;
    Ok(words.into_bytes())
}

fn plan_bounds(
    memory: &KernelMemory<'_>,
    layout: &TreeLayout,
    add: &[TreeNode],
    writes: &mut WriteBatch,
) -> Result<(), StepError> {
    let (Some(start), Some(end)) = (
        add.iter().map(|node| node.range.start).min(),
        add.iter().map(|node| node.range.end).max(),
    ) else {
        return Ok(());
    };
    let (min, max) = (
        memory.pointer(layout.addr_min)?,
        memory.pointer(layout.addr_max)?,
    );
    writes.write_kernel(memory, layout.addr_min, &min.min(start).0.to_le_bytes())?;
    Ok(writes.write_kernel(memory, layout.addr_max, &max.max(end).0.to_le_bytes())?)
}

fn broken(why: impl std::fmt::Display) -> StepError {
    StepError::Failed(unexpected(format!(
        "the guest's tree of modules (mod_tree) {why}"
    )))
}
