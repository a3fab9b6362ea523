//! Builds kallsyms tables in each layout, and corrupts them in many ways.

use proptest::prelude::*;

use super::*;

const BASE: u64 = 0xffff_ffff_9a00_0000;
const START: u64 = BASE + 0x100_0000;
const COUNT: usize = 70 * 256 + 17;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Layout {
    Old,
    OldWithSeqs,
    New,
    NewUnsigned,
    Relative,
}

const ALL: [Layout; 5] = [
    Layout::Old,
    Layout::OldWithSeqs,
    Layout::New,
    Layout::NewUnsigned,
    Layout::Relative,
];

fn symbol(n: usize) -> (u64, String) {
    match n {
        0 => (0x40, "Aa_per_cpu_thing".into()),
        1 => (BASE, "T_text".into()),
        n if n == COUNT - 1 => (BASE + 0x200_0000, "B_end".into()),
        n => (BASE + 16 * n as u64, format!("tfunction_number_{n}")),
    }
}

fn align(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

/// The tables of `scripts/kallsyms.c`, uncompressed: every token but one is its own letter.
fn tables(layout: Layout) -> Vec<u8> {
    let label = if layout == Layout::Relative { 4 } else { 8 };
    let first = usize::from(matches!(layout, Layout::Relative | Layout::NewUnsigned));
    let symbols: Vec<_> = (first..COUNT).map(symbol).collect();
    let mut names = Vec::new();
    let mut markers = Vec::new();
    for (n, (_, name)) in symbols.iter().enumerate() {
        if n % 256 == 0 {
            markers.extend((names.len() as u32).to_le_bytes());
        }
        // One name is long enough for a length of two bytes.
        let padded = if n == 5 && layout != Layout::Old {
            format!("{name}{}", "x".repeat(200))
        } else {
            name.clone()
        };
        let code = padded.replace("function", "\u{1}");
        if code.len() < 0x80 {
            names.push(code.len() as u8);
        } else {
            names.extend([(code.len() & 0x7f | 0x80) as u8, (code.len() >> 7) as u8]);
        }
        names.extend(code.bytes());
    }
    let mut table = Vec::new();
    let mut index = Vec::new();
    for token in 0..=255u8 {
        index.extend((table.len() as u16).to_le_bytes());
        match token {
            1 => table.extend(b"function"),
            b'!'..=b'~' => table.push(token),
            _ => table.extend(b"zz"),
        }
        table.push(0);
    }
    let offset = |at: usize, gva: u64| match layout {
        Layout::Relative => (gva as i64 - (START as i64 + at as i64)) as i32,
        Layout::NewUnsigned => gva.wrapping_sub(BASE) as i32,
        _ if gva < BASE => gva as i32,
        _ => (BASE as i64 - 1 - gva as i64) as i32,
    };
    let mut out = vec![0xee; 1000];
    let put = |out: &mut Vec<u8>, part: &[u8]| {
        align(out, label);
        out.extend(part);
    };
    let offsets = |out: &mut Vec<u8>| {
        align(out, label);
        for (gva, _) in &symbols {
            let at = out.len();
            out.extend(offset(at, *gva).to_le_bytes());
        }
    };
    let old = matches!(layout, Layout::Old | Layout::OldWithSeqs);
    if old {
        offsets(&mut out);
        put(&mut out, &BASE.to_le_bytes());
    }
    put(&mut out, &(symbols.len() as u32).to_le_bytes());
    put(&mut out, &names);
    put(&mut out, &markers);
    if layout == Layout::OldWithSeqs {
        put(&mut out, &vec![0x77; 3 * symbols.len()]);
    }
    put(&mut out, &table);
    put(&mut out, &index);
    if !old {
        offsets(&mut out);
        if layout != Layout::Relative {
            put(&mut out, &BASE.to_le_bytes());
        }
        put(&mut out, &vec![0x77; 3 * symbols.len()]);
    }
    out.extend([0xee; 100]);
    out
}

fn read(bytes: &[u8]) -> Result<Symbols, KallsymsError> {
    let start = Gva(START);
    parse(
        ImagePart { start, bytes },
        GvaRange::new(Gva(BASE), Gva(BASE + 0x400_0000)),
    )
}

#[test]
fn every_layout_is_read() {
    for layout in ALL {
        let symbols = read(&tables(layout)).unwrap_or_else(|e| panic!("{layout:?}: {e}"));
        assert_eq!(symbols.address("_text"), Ok(Gva(BASE)), "{layout:?}");
        assert_eq!(
            symbols.address("function_number_777"),
            Ok(Gva(BASE + 16 * 777))
        );
        assert_eq!(symbols.image().end, Gva(BASE + 0x200_0000));
        if !matches!(layout, Layout::Relative | Layout::NewUnsigned) {
            assert_eq!(symbols.len(), COUNT);
            assert_eq!(symbols.address("a_per_cpu_thing"), Ok(Gva(0x40)));
        }
    }
}

#[test]
fn the_error_names_the_corrupt_table() {
    let good = tables(Layout::Old);
    assert_eq!(
        read(&good[..good.len() / 2]).unwrap_err(),
        KallsymsError::NoTokens
    );
    let digits = digits(&good, 0).unwrap();
    let mut bad = good.clone();
    bad[digits + 600..].fill(0);
    assert_eq!(read(&bad).unwrap_err(), KallsymsError::NoTokens);
    let mut bad = good.clone();
    let names = bad.windows(5).position(|w| w == b"T_tex").unwrap();
    bad[names - 1] = 0;
    assert!(matches!(read(&bad), Err(KallsymsError::NoNames(_))));
    let mut bad = good;
    bad[..3000].fill(0xee);
    assert!(matches!(read(&bad), Err(KallsymsError::NoAddresses(_))));
}

#[test]
fn digits_are_found_at_any_offset() {
    for at in 0..50 {
        let mut bytes = vec![b'5'; at];
        bytes.extend(DIGITS);
        bytes.extend([0; 7]);
        assert_eq!(super::digits(&bytes, 0), Some(at));
        assert_eq!(super::digits(&bytes, at + 1), None);
    }
}

/// Twenty seconds are far more than the bounds allow, and a fraction of what it would take without
/// them.
fn in_time<T>(work: impl FnOnce() -> T) -> T {
    let start = std::time::Instant::now();
    let out = work();
    assert!(start.elapsed().as_secs() < 20, "took {:?}", start.elapsed());
    out
}

#[test]
fn an_image_full_of_digits_ends() {
    let bytes = DIGITS.repeat((24 << 20) / DIGITS.len());
    assert_eq!(
        in_time(|| read(&bytes)).unwrap_err(),
        KallsymsError::Endless
    );
}

#[test]
fn tokens_that_expand_names_too_far_are_refused() {
    let good = tables(Layout::New);
    let digits = digits(&good, 0).unwrap();
    let index = digits
        + good[digits..]
            .windows(6)
            .position(|w| w == [0, 0, 3, 0, 12, 0])
            .unwrap();
    // One token replaces many: 3000 letters where "zz" was, and every later index grows by as many.
    let table = digits - usize::from(u16::from_le_bytes([good[index + 96], good[index + 97]]));
    let token = table + usize::from(u16::from_le_bytes([good[index + 4], good[index + 5]]));
    let mut bad = good[..token].to_vec();
    bad.extend([b'y'; 3000]);
    bad.extend(&good[token..index]);
    for n in 0..256 {
        let at = index + 2 * n;
        let start = u16::from_le_bytes([good[at], good[at + 1]]);
        bad.extend((start + if n > 2 { 3000 } else { 0 }).to_le_bytes());
    }
    bad.extend(&good[index + 512..]);
    assert!(read(&bad).is_ok(), "as long as no name uses it");
    let name = bad.windows(6).position(|w| w == b"T_text").unwrap();
    bad[name + 1] = 2;
    assert!(matches!(read(&bad), Err(KallsymsError::NoAddresses(_))));
}

#[test]
fn markers_that_wrap_are_not_walked_again_and_again() {
    let good = tables(Layout::Old);
    let token_table = digits(&good, 0).unwrap() - 200;
    let mut bytes = Vec::new();
    for n in 0..4u32 << 20 {
        bytes.extend(n.wrapping_mul(0x8000).to_le_bytes());
    }
    bytes.extend(&good[token_table & !7..]);
    assert!(in_time(|| read(&bytes)).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_corruption_panics(
        which in 0usize..5,
        at in any::<prop::sample::Index>(),
        junk in proptest::collection::vec(any::<u8>(), 1..64),
    ) {
        let mut bytes = tables(ALL[which]);
        let at = at.index(bytes.len());
        let len = junk.len().min(bytes.len() - at);
        bytes[at..at + len].copy_from_slice(&junk[..len]);
        let _ = read(&bytes);
        bytes.truncate(at);
        let _ = read(&bytes);
    }
}
