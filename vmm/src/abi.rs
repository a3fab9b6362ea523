//! Reads `docs/ABI`, for the tests that compare it with the code.

use std::path::Path;

/// The directories, in the order in which an entry passes them.
const STAGES: [&str; 4] = ["testing", "stable", "obsolete", "removed"];

/// The fields of an entry, in order.
const FIELDS: [&str; 6] = [
    "What:",
    "Date:",
    "KernelVersion:",
    "Contact:",
    "Description:",
    "Users:",
];

/// One file of `docs/ABI`.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The names of what it describes; several that belong together.
    pub what: Vec<String>,
    /// Whether what it describes exists, which is not so in `removed`.
    pub present: bool,
    /// The whole file.
    pub text: String,
}

/// Every file of `docs/ABI`. Panics when one lacks a field.
pub(crate) fn entries() -> Vec<Entry> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ABI");
    let mut entries = Vec::new();
    for stage in STAGES {
        for file in std::fs::read_dir(root.join(stage)).unwrap() {
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
                present: stage != "removed",
                text,
            });
        }
    }
    entries
}

/// Asserts that of the names that begin with one of `prefixes`, `docs/ABI` describes exactly those
/// of `actual`, each once.
pub(crate) fn assert_described(prefixes: &[&str], actual: impl IntoIterator<Item = String>) {
    let mut described: Vec<String> = entries()
        .into_iter()
        .filter(|entry| entry.present)
        .flat_map(|entry| entry.what)
        .filter(|what| prefixes.iter().any(|prefix| what.starts_with(prefix)))
        .collect();
    described.sort();
    let mut actual: Vec<String> = actual.into_iter().collect();
    actual.sort();
    assert_eq!(
        described, actual,
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
