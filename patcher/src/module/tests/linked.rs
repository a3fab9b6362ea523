//! Modules that are linked: what the image holds, for different guests.

use introspect::Gva;

use super::*;
use crate::module::kernel::AltInstrLayout;
use crate::module::link::image::{LinkedFunction, OrcRecord};

/// The code of the sample's function.
fn code(image: &Image) -> &[u8] {
    &image.code[..29]
}

/// The address that the relative operand at `offset` of the code refers to.
fn operand_target(image: &Image, offset: usize) -> u64 {
    let operand = i32::from_le_bytes(image.code[offset..offset + 4].try_into().unwrap());
    (image.code_base.add(offset as u64 + 4))
        .offset(operand.into())
        .0
}

#[test]
fn a_module_with_every_table_is_linked() {
    let image = linked(&sample(), &FakeKernel::new()).unwrap();
    assert_eq!(image.name, "sample");
    assert!(!image.replace);
    let function = LinkedFunction {
        old_name: "victim".into(),
        sympos: 0,
        new: LOAD_AT.code,
        new_size: 29,
    };
    assert_eq!(image.functions, [function]);
    let code = code(&image);
    assert_eq!(code[..5], [0x0f, 0x1f, 0x44, 0, 0], "fentry is a NOP");
    let string = i32::from_le_bytes(code[8..12].try_into().unwrap());
    let string = Gva(i64::from(string).cast_unsigned()).since(image.rodata_base);
    assert!(image.rodata[usize::try_from(string).unwrap()..].starts_with(b"hello\0"));
    assert_eq!(operand_target(&image, 13), KERNEL + 0x300, "call puts");
    assert_eq!(code[17..20], [0x0f, 0x01, 0xcb], "stac");
    assert_eq!(
        code[20..22],
        [0xeb, 0x02],
        "the key is on, the branch is a jump"
    );
    assert_eq!(code[24], 0xe9);
    assert_eq!(
        operand_target(&image, 25),
        KERNEL + 0x480,
        "the return thunk in use"
    );
    assert_eq!(
        image.text,
        introspect::GvaRange::new(LOAD_AT.code, LOAD_AT.code.add(35))
    );
    let orc =
        [(0, [2, 0, 0, 0, 6, 0]), (29, [1, 0, 0, 0, 5, 0])].map(|(offset, entry)| OrcRecord {
            ip: LOAD_AT.code.add(offset),
            entry,
        });
    assert_eq!(image.orc, orc);
    // The data has pointers to itself and to the code; .bss is zero. It begins with struct module.
    let data = &image.data[24..];
    let at = |offset: u64| {
        let offset = usize::try_from(offset).unwrap();
        u64::from_le_bytes(data[offset..offset + 8].try_into().unwrap())
    };
    assert_eq!(at(PATCH), image.module.0, "klp_patch.mod is the module");
    assert_eq!(image.module, LOAD_AT.data);
    assert!(image.data[..24].iter().all(|&b| b == 0));
    assert_eq!(at(PATCH + 8), LOAD_AT.data.0 + 24 + OBJECTS);
    assert_eq!(at(FUNCTIONS + 8), LOAD_AT.code.0);
    assert!(data[320..420].iter().all(|&b| b == 0));
    assert_eq!(
        image.symbol_at(LOAD_AT.code.add(28)).unwrap().name,
        "new_victim"
    );
    assert_eq!(image.symbol_at(LOAD_AT.code.add(29)), None);
}

#[test]
fn the_image_has_the_sizes_that_the_module_gives() {
    let module = parse(&sample().bytes()).unwrap();
    let image = linked_at(&module, &FakeKernel::new(), LOAD_AT).unwrap();
    assert_eq!(module.sizes().code.len, image.code.len() as u64);
    assert_eq!(module.sizes().rodata.len, image.rodata.len() as u64);
    assert_eq!(module.sizes().data.len, image.data.len() as u64);
    for wrong in [
        LoadAddresses {
            code: LOAD_AT.code.add(1),
            ..LOAD_AT
        },
        LoadAddresses {
            data: LOAD_AT.code.add(16),
            ..LOAD_AT
        },
        LoadAddresses {
            rodata: LOAD_AT.data,
            ..LOAD_AT
        },
        LoadAddresses {
            data: Gva(u64::MAX - 15),
            ..LOAD_AT
        },
    ] {
        let error = linked_at(&module, &FakeKernel::new(), wrong).unwrap_err();
        assert!(matches!(error, LinkError::LoadAddress(_)), "{error:?}");
    }
}

#[test]
fn the_guests_cpu_and_mitigations_decide() {
    let mut target = FakeKernel::new();
    target.capabilities = vec![0, 0];
    target.set_memory(0x8000, &(KERNEL + 0x400).to_le_bytes());
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
    let mut target = FakeKernel::new();
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
    let mut target = FakeKernel::new();
    target.add_export("variable", KERNEL + 0x7000);
    if let Some(export) = target.exports.get_mut("variable") {
        export.crc = None;
    }
    target.set_memory(0x7000, &(KERNEL + 0x7777).to_le_bytes());
    let image = linked(&direct_call(), &target).unwrap();
    assert_eq!(code(&image)[12], 0xe8);
    assert_eq!(operand_target(&image, 13), KERNEL + 0x7777);
    assert_eq!(code(&image)[17], 0x90, "padded");
    // The kernel's empty function is not called at all.
    target.set_memory(0x7000, &(KERNEL + 0x600).to_le_bytes());
    let image = linked(&direct_call(), &target).unwrap();
    assert_eq!(code(&image)[12..18], [0x66, 0x0f, 0x1f, 0x44, 0, 0]);
    target.set_memory(0x7000, &[0; 8]);
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
    let image = linked(&with_key(".data..ro_after_init", 3), &FakeKernel::new()).unwrap();
    assert_eq!(branch(&image), [0x66, 0x90]);
    // A key of the kernel, read-only by now.
    let mut ko = with_key("kernel_key", 2);
    ko.undefined("kernel_key", UNDEFINED);
    let mut target = FakeKernel::new();
    target.add_export("kernel_key", KERNEL + 0x9100);
    target.exports.get_mut("kernel_key").unwrap().crc = None;
    for (count, want) in [(0i32, [0x66, 0x90]), (1, [0xeb, 2]), (-1, [0x66, 0x90])] {
        target.set_memory(0x9100, &count.to_le_bytes());
        assert_eq!(branch(&linked(&ko, &target).unwrap()), want, "{count}");
    }
    // The same while the guest boots.
    target.up = false;
    assert_eq!(error(&ko, &target), LinkError::Booting);
    // A key that may change, of the kernel and of the patch.
    let mut target = FakeKernel::new();
    target.add_export("kernel_key", KERNEL + 0xb000);
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
    assert_eq!(error(&ko, &FakeKernel::new()), refused);
}

#[test]
fn klp_relocations_are_resolved_in_the_kernels_symbols() {
    let mut ko = sample();
    ko.symbols.push(KoSymbol {
        name: ".klp.sym.vmlinux.hidden,2".into(),
        section: None,
        value: 0,
        size: 0,
        info: UNDEFINED,
        shndx: Some(0xff20),
    });
    let text = ko.get(".text");
    text.relocations.remove(2);
    text.klp_relocations.push((
        ".klp.rela.vmlinux..text".into(),
        13,
        PLT32,
        ".klp.sym.vmlinux.hidden,2".into(),
        -4,
    ));
    let mut target = FakeKernel::new();
    let hidden = vec![KERNEL + 0x1000, KERNEL + 0x2000];
    target.symbols.insert("hidden".into(), hidden);
    let image = linked(&ko, &target).unwrap();
    assert_eq!(operand_target(&image, 13), KERNEL + 0x2000);
    let used = |source| LinkError::Used {
        user: "new_victim".into(),
        source: Box::new(source),
    };
    // The kernel has freed its init code and data.
    let init = [("__init_begin", 0x2000), ("__init_end", 0x3000)];
    for (name, offset) in init {
        target.symbols.insert(name.into(), vec![KERNEL + offset]);
    }
    let freed = LinkError::InitSymbol("hidden".into());
    assert_eq!(error(&ko, &target), used(freed));
    target.symbols.insert("hidden".into(), vec![KERNEL]);
    let missing = LinkError::NotFound {
        name: "hidden".into(),
        sympos: 2,
    };
    assert_eq!(error(&ko, &target), used(missing));
    ko.get(".text").klp_relocations[0].0 = ".klp.rela.ext4..text".into();
    assert_eq!(module_error(&ko), ModuleError::ModuleTarget("ext4".into()));
}

#[test]
fn weak_symbols_that_are_not_there_are_null() {
    let mut ko = sample();
    ko.undefined("optional", WEAK);
    ko.get(".data")
        .relocations
        .push((8, R64, "optional".into(), 0));
    let image = linked(&ko, &FakeKernel::new()).unwrap();
    assert_eq!(image.data[8..16], [0; 8]);
}

#[test]
fn exports_are_used_by_the_kernels_rules() {
    let mut target = FakeKernel::new();
    target.exports.remove("puts");
    let used = |source| LinkError::Used {
        user: "new_victim".into(),
        source: Box::new(source),
    };
    assert_eq!(
        error(&sample(), &target),
        used(LinkError::UnknownSymbol("puts".into()))
    );
    let mut target = FakeKernel::new();
    target.exports.get_mut("puts").unwrap().gpl_only = true;
    assert!(linked(&sample(), &target).is_ok());
    let mut ko = sample();
    ko.modinfo("license", Some("Proprietary"));
    let gpl_only = LinkError::GplOnly {
        symbol: "puts".into(),
        license: "Proprietary".into(),
    };
    assert_eq!(error(&ko, &target), used(gpl_only));
    let mut target = FakeKernel::new();
    target.exports.get_mut("puts").unwrap().namespace = Some("SPACE".into());
    let namespace = LinkError::Namespace {
        symbol: "puts".into(),
        namespace: "SPACE".into(),
    };
    assert_eq!(error(&sample(), &target), used(namespace));
    let mut ko = sample();
    ko.modinfo("import_ns", Some("SPACE"));
    assert!(linked(&ko, &target).is_ok());
}

#[test]
fn addresses_that_the_guest_may_keep_are_found() {
    let taken = |change: &dyn Fn(&mut Ko)| {
        let mut ko = sample();
        change(&mut ko);
        linked(&ko, &FakeKernel::new()).unwrap().taken
    };
    // The sample passes a string to puts, and its klp_patch has pointers to its own code and data.
    let plain = taken(&|_| {});
    assert_eq!(plain.code, None);
    assert_eq!(plain.data.as_deref(), Some(".rodata.str1.1"));
    // An access is no taking: mov string(,%rax,1),%rdi is not even long enough to tell, so a load of
    // a variable takes the place of the string: mov limit(%rip),%rdi.
    let load = taken(&|ko| {
        let text = ko.get(".text");
        text.data[5..12].copy_from_slice(&[0x48, 0x8b, 0x3d, 0, 0, 0, 0]);
        text.relocations[1] = (8, PC32, ".bss".into(), -4);
    });
    assert_eq!((load.code, load.data), (None, None));
    // lea of a function of its own, as for call_rcu.
    let lea = taken(&|ko| {
        let text = ko.get(".text");
        text.data[5..12].copy_from_slice(&[0x48, 0x8d, 0x3d, 0, 0, 0, 0]);
        text.relocations[1] = (8, PC32, ".text".into(), -4);
    });
    assert_eq!(lea.code.as_deref(), Some("new_victim"));
    assert_eq!(lea.data, None);
    // A table of operations in its data.
    let table = taken(&|ko| {
        ko.get(".data")
            .relocations
            .push((312, R64, ".text".into(), 0))
    });
    assert_eq!(table.code.as_deref(), Some("new_victim"));
    // A direct call of its own function.
    let call = taken(&|ko| {
        ko.get(".text").relocations[2] = (13, PLT32, ".text".into(), -4);
    });
    assert_eq!(call.code, None);
}

/// The address that the word at `at` of `bytes`, which begin at `base`, holds the distance to.
fn word_target(bytes: &[u8], base: Gva, at: u64) -> u64 {
    let offset = usize::try_from(at).unwrap();
    let word = i32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap());
    base.add(at).offset(word.into()).0
}

#[test]
fn the_exception_table_is_sorted_and_has_placed_code_only() {
    let mut ko = sample();
    let mut bytes = Vec::new();
    for kind in [7u32, 8, 9] {
        bytes.extend([0; 8]);
        bytes.extend(kind.to_le_bytes());
    }
    ko.section("__ex_table", A, &bytes).relocations = vec![
        (0, PC32, ".text".into(), 22),
        (4, PC32, ".text".into(), 24),
        (12, PC32, ".init.text".into(), 0),
        (16, PC32, ".init.text".into(), 4),
        (24, PC32, ".text".into(), 5),
        (28, PC32, ".text".into(), 12),
    ];
    let image = linked(&ko, &FakeKernel::new()).unwrap();
    assert_eq!(image.extable.count, 2);
    let at = image.extable.at.since(image.rodata_base);
    let target = |offset| word_target(&image.rodata, image.rodata_base, at + offset);
    let code = LOAD_AT.code.0;
    assert_eq!((target(0), target(4)), (code + 5, code + 12));
    assert_eq!((target(12), target(16)), (code + 22, code + 24));
    let at = usize::try_from(at).unwrap();
    assert_eq!((image.rodata[at + 8], image.rodata[at + 20]), (9, 7));
    assert_eq!(image.taken.code, None, "no one keeps what is in the table");
    // A kernel whose entries have the address of a handler.
    let mut target = FakeKernel::new();
    target.layouts.exception.handler = Some(8);
    assert!(matches!(error(&ko, &target), LinkError::Table { .. }));
    let table = ko.get("__ex_table");
    table.relocations.push((8, PC32, "puts".into(), 0));
    table.relocations.push((32, PC32, "puts".into(), 0));
    let image = linked(&ko, &target).unwrap();
    let at = image.extable.at.since(image.rodata_base);
    let handler = word_target(&image.rodata, image.rodata_base, at + 8);
    assert_eq!(handler, KERNEL + 0x300);
}

#[test]
fn the_bug_table_keeps_its_entries_where_they_are() {
    let mut ko = sample();
    let mut bytes = vec![0; 32];
    bytes[28] = 5;
    ko.section("__bug_table", WA, &bytes).relocations = vec![
        (0, PC32, ".init.text".into(), 0),
        (8, PC32, ".rodata.str1.1".into(), 4),
        (16, PC32, ".text".into(), 22),
        (24, PC32, ".rodata.str1.1".into(), 4),
    ];
    let image = linked(&ko, &FakeKernel::new()).unwrap();
    assert_eq!(image.bugs.count, 2);
    let at = image.bugs.at.since(image.data_base);
    let target = |offset| word_target(&image.data, image.data_base, at + offset);
    // That of init code names itself.
    assert_eq!(target(0), image.bugs.at.0);
    assert_eq!(target(16), LOAD_AT.code.0 + 22);
    assert_eq!(target(24), image.rodata_base.0 + 4);
    assert_eq!(image.data[usize::try_from(at).unwrap() + 28], 5);
    assert_eq!(image.taken.code, None);
    ko.get("__bug_table").data.pop();
    assert!(matches!(
        error(&ko, &FakeKernel::new()),
        LinkError::Table { .. }
    ));
}

#[test]
fn tables_of_other_code_are_refused() {
    for name in ["__ex_table", "__bug_table"] {
        let mut ko = sample();
        let flags = if name == "__ex_table" { A } else { WA };
        let size = if name == "__ex_table" { 12 } else { 16 };
        ko.section(name, flags, &vec![0; size]).relocations =
            vec![(0, PC32, "puts".into(), 0), (4, PC32, ".text".into(), 0)];
        let message = error(&ko, &FakeKernel::new()).to_string();
        assert!(message.contains("not for code of the patch"), "{message}");
    }
}
