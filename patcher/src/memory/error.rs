//! Why there is no memory for a patch in the guest.

use introspect::Gva;

/// Why the guest has no memory for a patch, or no longer has what outpatch used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatchMemoryError {
    /// More bytes in one piece, or a larger alignment, than a hidden window has.
    #[error("the patch needs {bytes} bytes in one piece; at most {max} are possible")]
    TooLarge {
        /// The bytes, or the alignment.
        bytes: u64,
        /// The most that are possible.
        max: u64,
    },
    /// Every hidden window that a guest is given is in use.
    #[error("all {max} hidden windows of the guest are in use; revert a patch first")]
    NoWindow {
        /// How many there are.
        max: usize,
    },
    /// The guest uses every page table entry that could map a hidden window.
    #[error("the guest uses every entry of level2_fixmap_pgt that could map the patch")]
    NoEntry,
    /// The guest changed a page table entry that maps a hidden window.
    #[error("the guest took the page table entry at {0} for something else")]
    EntryTaken(Gva),
    /// The guest wrote to the padding of its text that the patch was to use.
    #[error("the padding of the kernel's text at {0} is no longer padding")]
    PaddingTaken(Gva),
    /// A mapping that was written leads nowhere.
    #[error(
        "the guest's page tables do not lead to {0}: level2_fixmap_pgt is not where it should be"
    )]
    NotMapped(Gva),
}
