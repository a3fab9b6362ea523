//! Whole modules through [`parse`](super::parse) and [`link`](super::link()).

use introspect::Gva;
use proptest::prelude::*;

use super::testing::*;
use super::*;

fn linked(ko: &Ko, target: &Table) -> Result<Image, LinkError> {
    link(&parse(&ko.bytes())?, target, BASES)
}

fn error(ko: &Ko, target: &Table) -> LinkError {
    linked(ko, target).expect_err("should not link")
}

fn module_error(ko: &Ko) -> ModuleError {
    match error(ko, &Table::new()) {
        LinkError::Module(error) => error,
        other => panic!("{other:?}"),
    }
}

/// The code of the sample's function.
fn code(image: &Image) -> &[u8] {
    &image.code[..29]
}

/// Where the relative operand at `offset` of the code leads.
fn leads(image: &Image, offset: usize) -> u64 {
    let operand = i32::from_le_bytes(image.code[offset..offset + 4].try_into().unwrap());
    (image.code_base.add(offset as u64 + 4))
        .offset(operand.into())
        .0
}

#[test]
fn a_module_with_everything_is_linked() {
    let image = linked(&sample(), &Table::new()).unwrap();
    assert_eq!(image.name, "sample");
    assert!(!image.replace);
    let function = LinkedFunction {
        old_name: "victim".into(),
        sympos: 0,
        new: BASES.code,
        new_size: 29,
    };
    assert_eq!(image.functions, [function]);
    let code = code(&image);
    assert_eq!(code[..5], [0x0f, 0x1f, 0x44, 0, 0], "fentry is a NOP");
    let string = i32::from_le_bytes(code[8..12].try_into().unwrap());
    let string = Gva(i64::from(string).cast_unsigned()).since(image.code_base);
    assert!(image.code[usize::try_from(string).unwrap()..].starts_with(b"hello\0"));
    assert_eq!(leads(&image, 13), KERNEL + 0x300, "call puts");
    assert_eq!(code[17..20], [0x0f, 0x01, 0xcb], "stac");
    assert_eq!(
        code[20..22],
        [0xeb, 0x02],
        "the key is on, the branch is a jump"
    );
    assert_eq!(code[24], 0xe9);
    assert_eq!(leads(&image, 25), KERNEL + 0x480, "the return thunk in use");
    assert_eq!(
        image.text,
        introspect::GvaRange::new(BASES.code, BASES.code.add(35))
    );
    let orc =
        [(0, [2, 0, 0, 0, 6, 0]), (29, [1, 0, 0, 0, 5, 0])].map(|(offset, entry)| OrcRecord {
            ip: BASES.code.add(offset),
            entry,
        });
    assert_eq!(image.orc, orc);
    // The data: pointers to itself and to the code, bss zero.
    let at = |offset: u64| {
        let offset = usize::try_from(offset).unwrap();
        u64::from_le_bytes(image.data[offset..offset + 8].try_into().unwrap())
    };
    assert_eq!(at(PATCH), 0, "klp_patch.mod stays empty");
    assert_eq!(at(PATCH + 8), BASES.data.0 + OBJECTS);
    assert_eq!(at(FUNCTIONS + 8), BASES.code.0);
    assert!(image.data[image.data.len() - 100..].iter().all(|&b| b == 0));
    assert_eq!(
        image.symbol_at(BASES.code.add(28)).unwrap().name,
        "new_victim"
    );
    assert_eq!(image.symbol_at(BASES.code.add(29)), None);
}

#[test]
fn the_image_fits_what_was_announced() {
    let module = parse(&sample().bytes()).unwrap();
    let image = link(&module, &Table::new(), BASES).unwrap();
    assert_eq!(module.sizes().code, image.code.len() as u64);
    assert_eq!(module.sizes().data, image.data.len() as u64);
    for wrong in [
        Bases {
            code: BASES.code.add(1),
            ..BASES
        },
        Bases {
            data: BASES.code.add(16),
            ..BASES
        },
        Bases {
            data: Gva(u64::MAX - 15),
            ..BASES
        },
    ] {
        let error = link(&module, &Table::new(), wrong).unwrap_err();
        assert!(matches!(error, LinkError::Place(_)), "{error:?}");
    }
}

#[test]
fn the_guests_cpu_and_mitigations_decide() {
    let mut target = Table::new();
    target.capabilities = vec![0, 0];
    target.set(0x8000, &(KERNEL + 0x400).to_le_bytes());
    let image = linked(&sample(), &target).unwrap();
    assert_eq!(
        code(&image)[17..20],
        [0x0f, 0x1f, 0x00],
        "no SMAP: the NOP stays"
    );
    assert_eq!(
        code(&image)[24..],
        [0xc3, 0xcc, 0xcc, 0xcc, 0xcc],
        "plain return"
    );
    // Inverted: patched when the feature is missing.
    let mut ko = sample();
    ko.get(".altinstructions").data[10] = 1;
    let image = linked(&ko, &target).unwrap();
    assert_eq!(code(&image)[17..20], [0x0f, 0x01, 0xcb]);
}

#[test]
fn the_old_layout_of_alternatives_has_its_flag_in_the_feature() {
    let mut target = Table::new();
    target.layouts.alt_instr = AltInstrLayout {
        size: 12,
        flags: None,
        instrlen: 10,
        replacementlen: 11,
        ..target.layouts.alt_instr
    };
    for (flag, stac) in [(0x00, true), (0x80, false)] {
        let mut ko = sample();
        let table = ko.get(".altinstructions");
        table.data.truncate(8);
        table.data.extend([3, flag, 3, 3]);
        let image = linked(&ko, &target).unwrap();
        assert_eq!(code(&image)[17..20] == [0x0f, 0x01, 0xcb], stac);
    }
}

/// The sample with `call *variable(%rip)` at 12 and a direct call of it as its alternative.
fn direct_call() -> Ko {
    let mut ko = sample();
    let text = ko.get(".text");
    text.data[12..18].copy_from_slice(&[0xff, 0x15, 0, 0, 0, 0]);
    text.data[18..20].copy_from_slice(&[0x66, 0x90]);
    text.relocations[2] = (14, PC32, "variable".into(), -4);
    ko.undefined("variable", UNDEFINED);
    ko.get(".altinstr_replacement").data = vec![0xe8, 1, 2, 3, 4];
    let table = ko.get(".altinstructions");
    table.data[10..14].copy_from_slice(&[2, 0, 6, 5]);
    table.relocations[0].3 = 12;
    ko
}

#[test]
fn indirect_calls_become_direct_ones() {
    let mut target = Table::new();
    target.give("variable", KERNEL + 0x7000);
    if let Some(export) = target.exports.get_mut("variable") {
        export.crc = None;
    }
    target.set(0x7000, &(KERNEL + 0x7777).to_le_bytes());
    let image = linked(&direct_call(), &target).unwrap();
    assert_eq!(code(&image)[12], 0xe8);
    assert_eq!(leads(&image, 13), KERNEL + 0x7777);
    assert_eq!(code(&image)[17], 0x90, "padded");
    // The kernel's empty function is not called at all.
    target.set(0x7000, &(KERNEL + 0x600).to_le_bytes());
    let image = linked(&direct_call(), &target).unwrap();
    assert_eq!(code(&image)[12..18], [0x66, 0x0f, 0x1f, 0x44, 0, 0]);
    target.set(0x7000, &[0; 8]);
    assert!(matches!(
        error(&direct_call(), &target),
        LinkError::Target(_)
    ));
}

#[test]
fn static_branches_follow_keys_that_cannot_change() {
    let with_key = |symbol: &str, addend| {
        let mut ko = sample();
        ko.get("__jump_table").relocations[2] = (8, PC64, symbol.into(), addend);
        ko
    };
    let branch = |image: &Image| [image.code[20], image.code[21]];
    // The branch's polarity is the low bit.
    let image = linked(&with_key(".data..ro_after_init", 3), &Table::new()).unwrap();
    assert_eq!(branch(&image), [0x66, 0x90]);
    // A key of the kernel, read-only by now.
    let mut ko = with_key("kernel_key", 2);
    ko.undefined("kernel_key", UNDEFINED);
    let mut target = Table::new();
    target.give("kernel_key", KERNEL + 0x9100);
    target.exports.get_mut("kernel_key").unwrap().crc = None;
    for (count, want) in [(0i32, [0x66, 0x90]), (1, [0xeb, 2]), (-1, [0x66, 0x90])] {
        target.set(0x9100, &count.to_le_bytes());
        assert_eq!(branch(&linked(&ko, &target).unwrap()), want, "{count}");
    }
    // The same, while the guest boots.
    target.up = false;
    assert_eq!(error(&ko, &target), LinkError::Booting);
    // A key that may change, of the kernel and of the patch.
    let mut target = Table::new();
    target.give("kernel_key", KERNEL + 0xb000);
    target.exports.get_mut("kernel_key").unwrap().crc = None;
    target
        .symbols
        .insert("kernel_key".into(), vec![KERNEL + 0xb000]);
    let refused = LinkError::StaticKey {
        function: "new_victim".into(),
        key: "kernel_key".into(),
    };
    assert_eq!(error(&ko, &target), refused);
    let mut ko = with_key("bss_key", 2);
    ko.symbol("bss_key", ".bss", 8, 16, OBJECT);
    let refused = LinkError::StaticKey {
        function: "new_victim".into(),
        key: "bss_key".into(),
    };
    assert_eq!(error(&ko, &Table::new()), refused);
}

#[test]
fn late_relocations_are_resolved_in_the_kernels_symbols() {
    let mut ko = sample();
    ko.symbols.push(Sym {
        name: ".klp.sym.vmlinux.hidden,2".into(),
        section: None,
        value: 0,
        size: 0,
        info: UNDEFINED,
        shndx: Some(0xff20),
    });
    let text = ko.get(".text");
    text.relocations.remove(2);
    text.late.push((
        ".klp.rela.vmlinux..text".into(),
        13,
        PLT32,
        ".klp.sym.vmlinux.hidden,2".into(),
        -4,
    ));
    let mut target = Table::new();
    let hidden = vec![KERNEL + 0x1000, KERNEL + 0x2000];
    target.symbols.insert("hidden".into(), hidden);
    let image = linked(&ko, &target).unwrap();
    assert_eq!(leads(&image, 13), KERNEL + 0x2000);
    target.symbols.insert("hidden".into(), vec![KERNEL]);
    assert!(matches!(error(&ko, &target), LinkError::NotFound { .. }));
    ko.get(".text").late[0].0 = ".klp.rela.ext4..text".into();
    assert_eq!(module_error(&ko), ModuleError::ModuleTarget("ext4".into()));
}

#[test]
fn weak_symbols_that_are_not_there_are_null() {
    let mut ko = sample();
    ko.undefined("optional", WEAK);
    ko.get(".data")
        .relocations
        .push((8, R64, "optional".into(), 0));
    let image = linked(&ko, &Table::new()).unwrap();
    assert_eq!(image.data[8..16], [0; 8]);
}

#[test]
fn modules_for_another_kernel_are_refused() {
    let mut ko = sample();
    ko.modinfo("vermagic", Some("9.9-test SMP preempt modversions "));
    let message = error(&ko, &Table::new()).to_string();
    assert!(message.contains("9.9-test SMP preempt"), "{message}");
    // With versions, the release may differ as long as they agree.
    ko.modinfo("vermagic", Some("9.8-other SMP modversions "));
    assert!(linked(&ko, &Table::new()).is_ok());
    let mut target = Table::new();
    target.exports.get_mut("puts").unwrap().crc = Some(1);
    let LinkError::Vermagic { symbol, .. } = error(&ko, &target) else {
        panic!("versions differ");
    };
    assert_eq!(symbol.as_deref(), Some("puts"));
    // A kernel without versions takes only its own.
    let mut target = Table::new();
    for export in target.exports.values_mut() {
        export.crc = None;
    }
    assert!(matches!(
        error(&ko, &target),
        LinkError::Vermagic { symbol: None, .. }
    ));
    assert!(linked(&sample(), &target).is_ok());
    // A kernel with versions takes no module without.
    let mut ko = sample();
    ko.remove("__versions");
    assert_eq!(
        error(&ko, &Table::new()),
        LinkError::NoVersion("module_layout".into())
    );
    let mut target = Table::new();
    target.layouts.module_size = 32;
    assert!(matches!(
        error(&sample(), &target),
        LinkError::ModuleStruct { .. }
    ));
}

#[test]
fn exports_are_used_by_the_kernels_rules() {
    let mut target = Table::new();
    target.exports.remove("puts");
    assert_eq!(
        error(&sample(), &target),
        LinkError::UnknownSymbol("puts".into())
    );
    let mut target = Table::new();
    target.exports.get_mut("puts").unwrap().gpl_only = true;
    assert!(linked(&sample(), &target).is_ok());
    let mut ko = sample();
    ko.modinfo("license", Some("Proprietary"));
    assert!(matches!(error(&ko, &target), LinkError::GplOnly { .. }));
    let mut target = Table::new();
    target.exports.get_mut("puts").unwrap().namespace = Some("SPACE".into());
    assert!(matches!(
        error(&sample(), &target),
        LinkError::Namespace { .. }
    ));
    let mut ko = sample();
    ko.modinfo("import_ns", Some("SPACE"));
    assert!(linked(&ko, &target).is_ok());
}

#[test]
fn what_is_no_livepatch_is_refused() {
    assert!(matches!(parse(b""), Err(ModuleError::NotElf)));
    assert!(matches!(parse(b"#!/bin/sh\n"), Err(ModuleError::NotElf)));
    assert!(matches!(
        parse(b"\xfd7zXZ\0rest"),
        Err(ModuleError::Compressed("xz"))
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
    ko.section("__ex_table", A, &[0; 12]).relocations = vec![(0, PC32, ".text".into(), 12)];
    let ModuleError::Section {
        section, function, ..
    } = module_error(&ko)
    else {
        panic!("an exception table");
    };
    assert_eq!(section, "__ex_table");
    assert_eq!(function.as_deref(), Some("new_victim"));
    for name in [".data..percpu", "__bug_table", "__mystery"] {
        let mut ko = sample();
        ko.section(name, WA, &[0; 8]);
        let message = module_error(&ko).to_string();
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn klp_patch_is_read_as_the_kernel_reads_it() {
    let klp = |change: &dyn Fn(&mut Ko)| {
        let mut ko = sample();
        change(&mut ko);
        module_error(&ko)
    };
    let mut ko = sample();
    ko.get(".data").data[PATCH as usize + 24] = 1;
    ko.get(".data").data[FUNCTIONS as usize + 16] = 3;
    let image = linked(&ko, &Table::new()).unwrap();
    assert!(image.replace);
    assert_eq!(image.functions[0].sympos, 3);

    let error = klp(&|ko| {
        let pointer = (OBJECTS, R64, ".rodata.str1.1".into(), 4);
        ko.get(".data").relocations.push(pointer);
    });
    assert_eq!(error, ModuleError::ModuleTarget("hello".into()));
    let error = klp(&|ko| {
        let callback = (OBJECTS + 24, R64, ".text".into(), 0);
        ko.get(".data").relocations.push(callback);
    });
    assert_eq!(
        error,
        ModuleError::Callbacks("post_patch = new_victim".into())
    );
    let error = klp(&|ko| {
        let states = (PATCH + 16, R64, ".data".into(), 300);
        ko.get(".data").relocations.push(states);
    });
    assert_eq!(error, ModuleError::States);
    // Each of these breaks the structure.
    for missing in [PATCH, PATCH + 8, OBJECTS + 8, FUNCTIONS, FUNCTIONS + 8] {
        let error = klp(&|ko| ko.get(".data").relocations.retain(|r| r.0 != missing));
        assert!(matches!(error, ModuleError::Klp(_)), "{missing}: {error:?}");
    }
    // A second entry that patches the same function.
    let error = klp(&|ko| {
        let data = ko.get(".data");
        data.relocations
            .push((FUNCTIONS + 32, R64, ".rodata.str1.1".into(), 10));
        data.relocations
            .push((FUNCTIONS + 40, R64, ".text".into(), 0));
    });
    assert!(error.to_string().contains("patched twice"), "{error}");
    // An array with no end.
    let error = klp(&|ko| {
        let data = ko.get(".data");
        data.data.truncate(FUNCTIONS as usize + 32);
    });
    assert!(matches!(error, ModuleError::Klp(_)), "{error:?}");
    // The replacement is in code that is not kept.
    let error = klp(&|ko| ko.get(".data").relocations[4].2 = ".init.text".into());
    assert!(matches!(error, ModuleError::Klp(_)), "{error:?}");
}

#[test]
fn the_init_function_says_which_patch_it_is() {
    // A second structure of the same shape, not the one that is enabled.
    let mut ko = sample();
    ko.get(".data").data.extend([0; 48]);
    ko.get(".data").relocations.extend([
        (320, R64, "__this_module".to_owned(), 0),
        (328, R64, ".data".to_owned(), 300),
    ]);
    ko.symbol("decoy", ".data", 320, 48, OBJECT);
    let second_mod = error(&ko, &Table::new());
    // The decoy's own reference to the module is not forgiven.
    assert!(
        matches!(second_mod, LinkError::Dropped { .. }),
        "{second_mod:?}"
    );
    let module = parse(&ko.bytes()).unwrap();
    assert_eq!(module.patch(&layouts().klp).unwrap().functions.len(), 1);
    // Neither tells: the code passes something unknown, and there are two.
    ko.get(".init.text").relocations.remove(0);
    assert!(matches!(module_error(&ko), ModuleError::Klp(_)));
    // By the symbol alone, when there is one.
    let mut ko = sample();
    ko.get(".init.text").relocations.remove(0);
    assert!(linked(&ko, &Table::new()).is_ok());
    // By the code alone, when symbols are stripped.
    let mut ko = sample();
    ko.symbols.retain(|s| s.name != "patch");
    assert!(linked(&ko, &Table::new()).is_ok());
    // By lea as well.
    let mut ko = sample();
    ko.symbols.retain(|s| s.name != "patch");
    let init = ko.get(".init.text");
    init.data[..7].copy_from_slice(&[0x48, 0x8d, 0x3d, 0, 0, 0, 0]);
    init.relocations[0] = (3, PC32, ".data".into(), PATCH as i64 - 4);
    assert!(linked(&ko, &Table::new()).is_ok());
}

#[test]
fn relocations_are_checked() {
    let with = |relocation: (u64, u32, &str, i64)| {
        let mut ko = sample();
        let (offset, kind, symbol, addend) = relocation;
        ko.get(".text").relocations[1] = (offset, kind, symbol.into(), addend);
        error(&ko, &Table::new())
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
    is(error(&ko, &Table::new()), "not empty");
}

#[test]
fn finished_code_is_looked_at_again() {
    let mut ko = sample();
    ko.get(".text").data[22] = 0x06; // no instruction in 64-bit mode
    assert!(matches!(error(&ko, &Table::new()), LinkError::Code { .. }));
    let mut ko = sample();
    ko.get(".text").relocations.remove(2);
    let LinkError::Code { at, .. } = error(&ko, &Table::new()) else {
        panic!("a call to nowhere");
    };
    assert_eq!(at, BASES.code.add(12));
    // Behind its section.
    let mut ko = sample();
    ko.symbol("long", ".text", 0, 1 << 40, FUNC);
    assert!(matches!(error(&ko, &Table::new()), LinkError::Code { .. }));
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
        wide in prop::option::of((any::<prop::sample::Index>(), prop::sample::select(vec![0u8, 0x7f, 0x80, 0xff]))),
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
            // Either way; what matters is that it ends, and in an answer.
            if let Ok(image) = link(&module, &Table::new(), BASES) {
                prop_assert_eq!(image.code.len() as u64, module.sizes().code);
            }
        }
    }
}
