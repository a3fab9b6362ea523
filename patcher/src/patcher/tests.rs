//! What a patcher lists of patches that were reverted.

use super::*;

fn reverted(name: &str, force: bool) -> PatchStatus {
    PatchStatus {
        name: name.into(),
        phase: PatchPhase::Reverted,
        enabled: false,
        transition: false,
        force,
        replace: false,
        signal: false,
        kept_bytes: 0,
        functions: vec![],
        tasks: vec![],
        transition_ms: 1,
        pauses: PauseReport::default(),
    }
}

#[test]
fn forced_patches_are_listed_permanently() {
    let mut patcher = Patcher::new();
    for (name, force) in [("a", false), ("b", true), ("c", true), ("d", false)] {
        patcher.set_reverted(Some(reverted(name, force)));
    }
    let names = |patcher: &Patcher| -> Vec<String> {
        let patches = patcher.status().into_iter();
        patches.map(|patch| patch.name).collect()
    };
    assert_eq!(names(&patcher), ["b", "c", "d"]);
    patcher.set_reverted(Some(reverted("c", true)));
    // As when `c` is applied again.
    patcher.set_reverted(None);
    assert_eq!(names(&patcher), ["b", "c", "c"]);
}
