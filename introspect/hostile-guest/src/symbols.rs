//! kallsyms tables as `scripts/kallsyms.c` of 6.4 and later writes them, with enough filler names
//! for a plausible kernel.

/// The number of names, enough for as many markers as the parser requires.
const COUNT: usize = 64 * 256;

/// The tables of the given symbols, and of fillers from the address `fill` on; `base` is `_text`.
pub fn tables(base: u64, symbols: &[(&str, u64)], fill: u64) -> Vec<u8> {
    let mut all: Vec<(String, u64)> = symbols
        .iter()
        .map(|(name, at)| (format!("T{name}"), *at))
        .collect();
    for (n, at) in (all.len()..COUNT).zip(fill..) {
        all.push((format!("tf{n:05}"), at));
    }
    of(base, &all)
}

/// The tables of these symbols, each name preceded by its type letter.
pub fn of(base: u64, all: &[(String, u64)]) -> Vec<u8> {
    let mut names = Vec::new();
    let mut markers = Vec::new();
    for (n, (name, _)) in all.iter().enumerate() {
        if n % 256 == 0 {
            markers.extend((names.len() as u32).to_le_bytes());
        }
        names.push(name.len() as u8);
        names.extend(name.bytes());
    }
    let (table, index) = tokens();
    let mut out = (all.len() as u32).to_le_bytes().to_vec();
    out.extend([0; 4]);
    out.extend(names);
    for part in [markers, table, index, offsets(base, all)] {
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend(part);
    }
    out.resize(out.len().next_multiple_of(8), 0);
    out.extend(base.to_le_bytes());
    out
}

/// Every token is a single letter.
fn tokens() -> (Vec<u8>, Vec<u8>) {
    let (mut table, mut index) = (Vec::new(), Vec::new());
    for token in 0..=255u8 {
        index.extend((table.len() as u16).to_le_bytes());
        match token {
            b'!'..=b'~' => table.push(token),
            _ => table.extend(b"zz"),
        }
        table.push(0);
    }
    (table, index)
}

/// `CONFIG_KALLSYMS_ABSOLUTE_PERCPU`: small numbers are absolute, addresses are negative distances
/// from the base.
fn offsets(base: u64, symbols: &[(String, u64)]) -> Vec<u8> {
    symbols
        .iter()
        .flat_map(|(_, at)| match at.checked_sub(base) {
            None => (*at as u32).to_le_bytes(),
            Some(distance) => (!(distance as u32)).to_le_bytes(),
        })
        .collect()
}
