//! Reads `docs/ABI`, for the tests that hold the code and its promise against each other.

use std::path::Path;

/// The folders, from a first offer to the end.
const PROMISES: [&str; 4] = ["testing", "stable", "obsolete", "removed"];

/// The fields of an entry, in their order.
const FIELDS: [&str; 6] = [
    "What:",
    "Date:",
    "KernelVersion:",
    "Contact:",
    "Description:",
    "Users:",
];

/// One file.
#[derive(Debug)]
pub(crate) struct Entry {
    /// What it describes; several where they belong together.
    pub what: Vec<String>,
    /// Whether it is there: not in `removed`.
    pub there: bool,
    /// All of it.
    pub text: String,
}

/// Every file of `docs/ABI`; panics at one that lacks a field.
pub(crate) fn entries() -> Vec<Entry> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ABI");
    let mut entries = Vec::new();
    for promise in PROMISES {
        for file in std::fs::read_dir(root.join(promise)).unwrap() {
            let path = file.unwrap().path();
            if path.ends_with("README.md") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let fields: Vec<&str> = text
                .lines()
                .filter(|line| !line.starts_with(['\t', ' ']))
                .filter_map(|line| line.split_whitespace().next())
                .collect();
            let mut unique = fields.clone();
            unique.dedup();
            assert_eq!(unique, FIELDS, "{}", path.display());
            let what = text
                .lines()
                .filter_map(|line| line.strip_prefix("What:"))
                .map(|what| what.trim().to_owned())
                .collect();
            entries.push(Entry {
                what,
                there: promise != "removed",
                text,
            });
        }
    }
    entries
}

/// Asserts that `there`, and nothing else that begins with one of `prefixes`, is described as being there, each once.
pub(crate) fn assert_described(prefixes: &[&str], there: impl IntoIterator<Item = String>) {
    let mut described: Vec<String> = entries()
        .into_iter()
        .filter(|entry| entry.there)
        .flat_map(|entry| entry.what)
        .filter(|what| prefixes.iter().any(|prefix| what.starts_with(prefix)))
        .collect();
    described.sort();
    let mut there: Vec<String> = there.into_iter().collect();
    there.sort();
    assert_eq!(
        described, there,
        "docs/ABI (left) and the code (right) differ"
    );
}

/// The text of the file that describes `what`.
pub(crate) fn describing(what: &str) -> String {
    let mut found = entries()
        .into_iter()
        .filter(|entry| entry.what.iter().any(|w| w == what));
    found
        .next()
        .unwrap_or_else(|| panic!("no file for {what}"))
        .text
}
