//! Modules that are refused, each with an error that names what is wrong.

use proptest::prelude::*;

use super::*;

#[test]
fn modules_for_another_kernel_are_refused() {
    let mut ko = sample();
    ko.modinfo("vermagic", Some("9.9-test SMP preempt modversions "));
    let message = error(&ko, &FakeKernel::new()).to_string();
    assert!(message.contains("9.9-test SMP preempt"), "{message}");
    // With versions, the release may differ as long as the versions agree.
    ko.modinfo("vermagic", Some("9.8-other SMP modversions "));
    assert!(linked(&ko, &FakeKernel::new()).is_ok());
    let mut target = FakeKernel::new();
    target.exports.get_mut("puts").unwrap().crc = Some(1);
    let LinkError::Vermagic { symbol, .. } = error(&ko, &target) else {
        panic!("versions differ");
    };
    assert_eq!(symbol.as_deref(), Some("puts"));
    // A kernel without versions accepts only modules of its own release.
    let mut target = FakeKernel::new();
    for export in target.exports.values_mut() {
        export.crc = None;
    }
    assert!(matches!(
        error(&ko, &target),
        LinkError::Vermagic { symbol: None, .. }
    ));
    assert!(linked(&sample(), &target).is_ok());
    // A kernel with versions accepts no module without them.
    let mut ko = sample();
    ko.remove("__versions");
    assert_eq!(
        error(&ko, &FakeKernel::new()),
        LinkError::NoVersion("module_layout".into())
    );
    let mut target = FakeKernel::new();
    target.layouts.module_size = 32;
    assert!(matches!(
        error(&sample(), &target),
        LinkError::ModuleStruct { .. }
    ));
}

#[test]
fn files_that_are_not_livepatches_are_refused() {
    assert!(matches!(parse(b""), Err(ModuleError::NotElf)));
    assert!(matches!(parse(b"#!/bin/sh\n"), Err(ModuleError::NotElf)));
    assert!(matches!(
        parse(b"\xfd7zXZ\0rest"),
        Err(ModuleError::Compression { format: "xz", .. })
    ));
    assert!(matches!(parse(b"\x7fELF"), Err(ModuleError::Damaged(_))));
    let good = sample().bytes();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        parse(&bytes).unwrap_err()
    };
    assert!(matches!(with(4, 1), ModuleError::WrongElf(_)), "32 bit");
    assert!(
        matches!(with(16, 3), ModuleError::WrongElf(_)),
        "shared object"
    );
    assert!(matches!(with(18, 183), ModuleError::WrongElf(_)), "arm64");
    let mut ko = sample();
    ko.modinfo("livepatch", None);
    assert_eq!(module_error(&ko), ModuleError::NotLivepatch);
    for key in ["name", "vermagic"] {
        let mut ko = sample();
        ko.modinfo(key, None);
        assert_eq!(module_error(&ko), ModuleError::Modinfo(key));
    }
    let mut ko = sample();
    ko.modinfo("name", Some("../../etc"));
    assert_eq!(module_error(&ko), ModuleError::Modinfo("name"));
    let mut ko = sample();
    ko.modinfo("depends", Some("virtio_net"));
    assert_eq!(
        module_error(&ko),
        ModuleError::Dependencies("virtio_net".into())
    );
    let mut ko = sample();
    ko.remove(".gnu.linkonce.this_module");
    ko.symbols.retain(|s| s.name != "__this_module");
    ko.undefined("__this_module", UNDEFINED);
    assert!(matches!(module_error(&ko), ModuleError::WrongElf(_)));
}

#[test]
fn formats_and_sections_that_are_not_supported_are_named() {
    for (section, tool) in [
        (".kpatch.funcs", "kpatch-build"),
        (".init.klp_objects", "klp-build"),
    ] {
        let mut ko = sample();
        ko.section(section, WA, &[0; 8]);
        assert_eq!(module_error(&ko), ModuleError::Format(tool));
    }
    let mut ko = sample();
    ko.section("__tracepoints", A, &[0; 12]).relocations = vec![(0, PC32, ".text".into(), 12)];
    let ModuleError::Section {
        section, functions, ..
    } = module_error(&ko)
    else {
        panic!("tracepoints");
    };
    assert_eq!(section, "__tracepoints");
    assert_eq!(functions, ["new_victim"]);
    for name in [".data..percpu", "__dyndbg", "__mystery"] {
        let mut ko = sample();
        ko.section(name, WA, &[0; 8]);
        let message = module_error(&ko).to_string();
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn every_reason_is_told_at_once() {
    let mut ko = sample();
    ko.modinfo("depends", Some("virtio_net"));
    ko.section("__dyndbg", WA, &[0; 24]).relocations = vec![
        (0, PC32, ".text".into(), 12),
        (12, PC32, ".text".into(), 14),
    ];
    // A reference to a table that is refused is not told once more.
    ko.get(".data")
        .relocations
        .push((0, R64, "__dyndbg".into(), 0));
    ko.get(".data")
        .relocations
        .push((8, R64, ".init.text".into(), 4));
    let mut target = FakeKernel::new();
    target.exports.remove("puts");
    let module = parse(&ko.bytes()).unwrap();
    let errors = all_errors(&module, &target, LOAD_AT).unwrap_err();
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    let expected = [
        "the module depends on other modules (virtio_net)",
        "section __dyndbg (for function new_victim)",
        "unknown symbol puts: the guest kernel does not export it (used by new_victim)",
        ".data+0x8 refers to .init.text, which is init code",
    ];
    assert_eq!(texts.len(), expected.len(), "{texts:?}");
    for (text, expected) in texts.iter().zip(expected) {
        assert!(text.starts_with(expected), "{text}");
    }
    // Of a module for another kernel, only that is told.
    ko.modinfo("vermagic", Some("9.9-test SMP preempt modversions "));
    let module = parse(&ko.bytes()).unwrap();
    let errors = all_errors(&module, &target, LOAD_AT).unwrap_err();
    assert!(
        matches!(&errors[..], [LinkError::Vermagic { .. }]),
        "{errors:?}"
    );
}

#[test]
fn a_file_without_symbols_is_called_stripped() {
    let mut bytes = sample().bytes();
    let table = u64::from_le_bytes(bytes[40..48].try_into().unwrap());
    let table = usize::try_from(table).unwrap();
    for header in bytes[table..].chunks_exact_mut(64) {
        if header[4] == 2 {
            header[4] = 1; // SHT_SYMTAB becomes SHT_PROGBITS
        }
    }
    assert_eq!(parse(&bytes).unwrap_err(), ModuleError::Stripped);
}

#[test]
fn relocations_are_checked() {
    let with = |relocation: (u64, u32, &str, i64)| {
        let mut ko = sample();
        let (offset, kind, symbol, addend) = relocation;
        ko.get(".text").relocations[1] = (offset, kind, symbol.into(), addend);
        error(&ko, &FakeKernel::new())
    };
    let is = |error: LinkError, part: &str| {
        assert!(matches!(error, LinkError::Relocation { .. }), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    };
    is(with((8, 9, "puts", 0)), "type 9");
    is(with((8, R32, "puts", 0)), "out of reach");
    is(with((8, PC32, "puts", i64::from(i32::MIN))), "out of reach");
    is(with((13, PC32, "puts", 0)), "not empty");
    is(with((0, PC32, "puts", 0)), "not empty");
    is(with((8, PLT32, "__fentry__", -4)), "__fentry__");
    let to_init = with((8, R32S, ".init.text", 0));
    assert!(matches!(to_init, LinkError::Dropped { .. }), "{to_init:?}");
    // Two at one place.
    let mut ko = sample();
    let relocation = ko.get(".text").relocations[2].clone();
    ko.get(".text").relocations.push(relocation);
    is(error(&ko, &FakeKernel::new()), "not empty");
}

#[test]
fn linked_code_is_verified() {
    let mut ko = sample();
    ko.get(".text").data[22] = 0x06; // no instruction in 64-bit mode
    assert!(matches!(
        error(&ko, &FakeKernel::new()),
        LinkError::Code { .. }
    ));
    let mut ko = sample();
    ko.get(".text").relocations.remove(2);
    let LinkError::Code { at, .. } = error(&ko, &FakeKernel::new()) else {
        panic!("a call to nowhere");
    };
    assert_eq!(at, LOAD_AT.code.add(12));
    // A function that extends past its section.
    let mut ko = sample();
    ko.symbol("long", ".text", 0, 1 << 40, FUNC);
    assert!(matches!(
        error(&ko, &FakeKernel::new()),
        LinkError::Code { .. }
    ));
}

#[test]
fn sizes_have_limits() {
    let mut ko = sample();
    ko.get(".bss").zeroes = u64::MAX - 4096;
    assert!(matches!(module_error(&ko), ModuleError::TooMany { .. }));
    let mut ko = sample();
    ko.get(".data").align = 1 << 40;
    assert!(matches!(module_error(&ko), ModuleError::Damaged(_)));
    let mut ko = sample();
    ko.get(".data").align = 3;
    assert!(matches!(module_error(&ko), ModuleError::Damaged(_)));
    assert!(matches!(
        parse(&vec![0; (64 << 20) + 1]),
        Err(ModuleError::TooLarge { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_truncated_file_is_an_error(cut in 0usize..10_000) {
        let bytes = sample().bytes();
        let cut = cut % bytes.len();
        prop_assert!(parse(&bytes[..cut]).is_err());
    }

    #[test]
    fn no_change_of_the_file_makes_it_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        wide in prop::option::of((
            any::<prop::sample::Index>(),
            prop::sample::select(vec![0u8, 0x7f, 0x80, 0xff]),
        )),
    ) {
        let mut bytes = sample().bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some((at, byte)) = wide {
            let at = at.index(bytes.len() - 8);
            bytes[at..at + 8].fill(byte);
        }
        if let Ok(module) = parse(&bytes) {
            // It may link or not; what matters is that linking returns.
            if let Ok(image) = linked_at(&module, &FakeKernel::new(), LOAD_AT) {
                prop_assert_eq!(image.code.len() as u64, module.sizes().code.len);
            }
        }
    }
}
