//! Why the guest has no memory for a patch.

use introspect::Gva;

/// Why the guest has no memory for a patch, or no longer has what outpatch used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatchMemoryError {
    /// The request is longer than a hidden window.
    #[error("the patch needs {bytes} contiguous bytes; at most {max} are possible")]
    TooLarge {
        /// The requested length, in bytes.
        bytes: u64,
        /// The limit, in bytes.
        max: u64,
    },
    /// The request has an alignment that no address in a hidden window has.
    #[error("the patch needs an alignment of {align} bytes; at most {max} are possible")]
    AlignmentTooLarge {
        /// The requested alignment, in bytes.
        align: u64,
        /// The limit, in bytes.
        max: u64,
    },
    /// The guest has as many hidden windows as it may have, and all are in use.
    #[error("all {max} hidden windows of the guest are in use; revert a patch first")]
    NoHiddenWindow {
        /// The limit.
        max: usize,
    },
    /// The guest uses every page table entry that could map a hidden window.
    #[error("the guest uses every entry of level2_fixmap_pgt that could map the patch")]
    NoEntry,
    /// The guest changed a page table entry that maps a hidden window.
    #[error("the guest changed the page table entry at {0}, which maps patch memory")]
    EntryTaken(Gva),
    /// All hidden windows are in use, and some of their memory is free when a grace period of the
    /// guest's RCU is over.
    #[error(
        "all hidden windows of the guest are in use, and {bytes} bytes of reverted patches wait for \
         the guest's RCU (rcu_state.gp_seq must reach {until}, it is {now}); try again"
    )]
    Quarantined {
        /// How many bytes wait.
        bytes: u64,
        /// The sequence number of grace periods at which the first of them are free.
        until: u64,
        /// The present one.
        now: u64,
    },
    /// The mapping of a hidden window was written, but the page tables do not lead there.
    #[error(
        "the guest's page tables do not lead to {0}: level2_fixmap_pgt is not where it should be"
    )]
    NotMapped(Gva),
    /// Reverted patches keep too much memory.
    #[error(
        "patches that were reverted keep {kept} bytes in the guest, as it may hold their addresses; \
         with this one it could be more than the {max} that are allowed; restart the guest"
    )]
    TooMuchKept {
        /// Bytes that are kept.
        kept: u64,
        /// The most that are allowed.
        max: u64,
    },
}
