//! Finds the kernel's functions that a patch replaces, by livepatch's own rules.
//!
//! This module follows `kernel/livepatch/core.c: klp_find_object_symbol`. Unlike the kernel, it
//! also finds the parts of a function that the compiler put elsewhere, because a task in `foo.cold`
//! is in `foo`.

use introspect::GvaRange;
use introspect::symbols::Symbols;

use crate::module::error::LinkError;
use crate::module::link::symbols::pick;

/// A function of the kernel, with all of its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedFunction {
    /// The name that it was searched by.
    pub name: String,
    /// The function itself, from its first byte to the next symbol, as kallsyms counts.
    pub range: GvaRange,
    /// Its parts elsewhere (`foo.cold`, `foo.part.0`, `foo.part.0.cold`). When several functions
    /// have the name, the parts of all of them: the kernel does not record which part belongs to
    /// which.
    pub parts: Vec<GvaRange>,
}

impl ResolvedFunction {
    /// The function itself and its parts.
    pub fn ranges(&self) -> impl Iterator<Item = GvaRange> {
        std::iter::once(self.range).chain(self.parts.iter().copied())
    }
}

/// The kernel's function `name`: the only one (`sympos` 0), or the one at position `sympos` by
/// address.
///
/// # Errors
/// [`LinkError::NotFound`], [`LinkError::Ambiguous`].
pub fn resolve_function(
    symbols: &Symbols,
    name: &str,
    sympos: u64,
) -> Result<ResolvedFunction, LinkError> {
    let found: Vec<_> = symbols.all(name).map(|symbol| symbol.gva).collect();
    let start = pick(&found, name, sympos)?;
    let range = symbols
        .extent(start)
        .filter(|range| range.start == start && !range.is_empty())
        .ok_or_else(|| LinkError::NotFound {
            name: name.to_owned(),
            sympos,
        })?;
    let parts = symbols
        .prefixed(&format!("{name}."))
        .filter(|symbol| symbol.name.strip_prefix(name).is_some_and(is_part))
        .filter_map(|symbol| symbols.extent(symbol.gva))
        .collect();
    Ok(ResolvedFunction {
        name: name.to_owned(),
        range,
        parts,
    })
}

/// Whether a suffix names a part of the function (any number of `.part.N`, then perhaps `.cold` or
/// `.cold.N`) and not a clone (`.isra.0`, `.constprop.0`), which is patched as a function of its
/// own.
fn is_part(suffix: &str) -> bool {
    let mut words = suffix.split('.').skip(1).peekable();
    let mut any = false;
    while words.next_if_eq(&"part").is_some() {
        if !words.next().is_some_and(is_number) {
            return false;
        }
        any = true;
    }
    if words.next_if_eq(&"cold").is_some() {
        words.next_if(|word| is_number(word));
        any = true;
    }
    any && words.next().is_none()
}

fn is_number(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::is_part;

    #[test]
    fn parts_and_clones_are_told_apart() {
        for part in [
            ".cold",
            ".cold.7",
            ".part.0",
            ".part.0.cold",
            ".part.1.part.2.cold.3",
        ] {
            assert!(is_part(part), "{part}");
        }
        for other in [
            "",
            ".",
            ".isra.0",
            ".constprop.0",
            ".isra.0.cold",
            ".part",
            ".part.x",
            ".cold.x",
            ".colder",
            ".cold.1.2",
        ] {
            assert!(!is_part(other), "{other}");
        }
    }
}
