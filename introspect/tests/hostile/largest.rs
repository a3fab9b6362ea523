//! Tables at their limits keep the bounds on time and memory; larger ones are refused.

use introspect::internals::orc::MAX_ENTRIES;
use introspect::unwind::OrcEncoding;
use introspect::unwind::{OrcTable, OrcTableError};
use introspect::{Btf, BtfError, Gva};

use introspect::modules;
use introspect::modules::{ListingError, modules_and_runtime};

use hostile_guest::image::{self, module_at, virt};
use hostile_guest::{self, bounded};

#[test]
fn btf_with_the_most_types() {
    const TYPES: usize = 1 << 19;
    const NAME: &[u8] = b"\0a_name_of_middling_length_that_all_of_the_structures_share\0";
    let section = |count: usize| {
        // struct NAME { };
        let types: Vec<u8> = [1u32, 4 << 24, 0]
            .repeat(count)
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let len = u32::try_from(types.len()).unwrap();
        let strings = u32::try_from(NAME.len()).unwrap();
        let header = [0x0001_eb9f, 24, 0, len, len, strings];
        let header = header.iter().flat_map(|word| word.to_le_bytes());
        header.chain(types).chain(NAME.iter().copied()).collect()
    };
    let good: Vec<u8> = section(TYPES);
    let types = bounded("BTF", || Btf::parse(good.clone())).unwrap();
    assert_eq!(types.len(), TYPES);
    bounded("a name", || {
        assert!(types.size_of("a_name_of_middling_length").is_err());
    });
    let more = section(TYPES + 1);
    let found = bounded("BTF", || Btf::parse(more.clone()));
    assert!(matches!(found, Err(BtfError::Truncated(_))), "{found:?}");
}

#[test]
fn the_longest_orc_table() {
    const CALL: [u8; 6] = [8, 0, 0, 0, 5, 2];
    let build = |count: usize| {
        // Self-relative, so that all have the same address.
        let ips: Vec<u8> = (0..count)
            .map(|n| -i32::try_from(4 * n).unwrap())
            .flat_map(i32::to_le_bytes)
            .collect();
        let entries = CALL.repeat(count);
        bounded("ORC", || {
            // The bytes read of the guest are held at the same time.
            let (ips, entries) = (ips.clone(), entries.clone());
            OrcTable::from_sections(Gva(1 << 40), &ips, &entries, OrcEncoding::Typed)
        })
        .map(|table| table.len())
    };
    assert_eq!(build(MAX_ENTRIES), Ok(MAX_ENTRIES));
    let more = MAX_ENTRIES + 1;
    assert_eq!(build(more), Err(OrcTableError::TooLong(more as u64)));
}

#[test]
fn a_module_with_the_most_symbols() {
    const SYMBOLS: usize = 1 << 18;
    const SYMBOL: usize = 24;
    let (table, strings) = (4 << 20, (4 << 20) + SYMBOLS * SYMBOL);
    let mut ram = hostile_guest::ram().to_vec();
    ram.resize(strings + 0x1000, 0);
    for symbol in ram[table..strings].as_chunks_mut::<SYMBOL>().0 {
        symbol[..8].copy_from_slice(&[1, 0, 0, 0, 0x12, 0, 1, 0]);
    }
    ram[strings + 1..strings + 61].fill(b'a');
    // The direct map has one large page for each 2 MiB of it.
    let mut put = |at: usize, value: u64| ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
    for n in 1..6 {
        put(
            image::IMAGE + image::TABLES + 0x4000 + 8 * n,
            (n as u64) << 21 | 0x83,
        );
    }
    let at = module_at(0) + 0x200;
    put(at, image::DIRECT + table as u64);
    put(at + 8, SYMBOLS as u64);
    put(at + 16, image::DIRECT + strings as u64);
    let memory = hostile_guest::mutate::Mutated::of(&ram[..]);
    let kernel = hostile_guest::kernel();
    let reader = kernel.memory(&memory);
    let module = modules::list(kernel, &reader).unwrap().remove(0);
    let symbols = bounded("symbols", || module.symbols(kernel, &reader)).unwrap();
    assert_eq!(symbols.iter().count(), SYMBOLS);
}

#[test]
fn modules_that_share_one_table_of_symbols() {
    const MODULES: usize = 4096;
    const SYMBOLS: usize = 1 << 12;
    for name in [0u8, 1] {
        let mut ram = hostile_guest::ram().to_vec();
        ram.resize(8 << 20, 0);
        let (at, table) = (|n: usize| (4 << 20) + 0x100 * n, 6 << 20);
        for symbol in ram[table..table + SYMBOLS * 24].as_chunks_mut::<24>().0 {
            symbol[..8].copy_from_slice(&[name, 0, 0, 0, 0x12, 0, 1, 0]);
        }
        let strings = (8 << 20) - 0x1000;
        ram[strings + 1..strings + 61].fill(b'a');
        let mut put = |at: usize, value: u64| ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
        for n in 1..4 {
            let entry = image::IMAGE + image::TABLES + 0x4000 + 8 * n;
            put(entry, (n as u64) << 21 | 0x83);
        }
        // One `struct mod_kallsyms` for all.
        let direct = |at: usize| image::DIRECT + at as u64;
        for (n, word) in [table, SYMBOLS, strings, strings].into_iter().enumerate() {
            let word = if n == 1 { word as u64 } else { direct(word) };
            put(0x7_0000 + 8 * n, word);
        }
        put(image::MODULES_HEAD, direct(at(0) + 8));
        for n in 0..MODULES {
            let next = match n + 1 {
                MODULES => virt(image::MODULES_HEAD),
                next => direct(at(next) + 8),
            };
            put(at(n) + 8, next);
            put(at(n) + 192, direct(0x7_0000));
        }
        let memory = hostile_guest::mutate::Mutated::of(&ram[..]);
        let kernel = hostile_guest::kernel();
        let reader = kernel.memory(&memory);
        assert_eq!(modules::list(kernel, &reader).unwrap().len(), MODULES);
        let found = bounded("a listing", || modules_and_runtime(kernel, &reader));
        let too_much = matches!(found, Err(ListingError::TooMuch { .. }));
        assert!(too_much, "{name}: {:?}", found.map(|list| list.len()));
    }
}
