//! `struct klp_patch` as it is read from a module.

use super::*;

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
    let image = linked(&ko, &FakeKernel::new()).unwrap();
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
    // The new function is in code that is not placed in the guest.
    let error = klp(&|ko| ko.get(".data").relocations[4].2 = ".init.text".into());
    assert!(matches!(error, ModuleError::Klp(_)), "{error:?}");
}

#[test]
fn the_init_function_shows_which_patch_is_enabled() {
    // A second structure of the same shape, not the one that is enabled.
    let mut ko = sample();
    ko.get(".data").data.extend([0; 48]);
    ko.get(".data").relocations.extend([
        (320, R64, "__this_module".to_owned(), 0),
        (328, R64, ".data".to_owned(), 300),
    ]);
    ko.symbol("decoy", ".data", 320, 48, OBJECT);
    assert!(linked(&ko, &FakeKernel::new()).is_ok());
    let module = parse(&ko.bytes()).unwrap();
    let patch = module.patch(&layouts().klp, &mut Vec::new()).unwrap();
    assert_eq!(patch.functions.len(), 1);
    // The code passes something unknown: not even one structure of the right size will do.
    let mut ko = sample();
    ko.get(".init.text").relocations.remove(0);
    assert!(matches!(module_error(&ko), ModuleError::Init(_)));
    // By the code alone, when symbols are stripped.
    let mut ko = sample();
    ko.symbols.retain(|s| s.name != "patch");
    assert!(linked(&ko, &FakeKernel::new()).is_ok());
    // By lea as well.
    let mut ko = sample();
    ko.symbols.retain(|s| s.name != "patch");
    let init = ko.get(".init.text");
    init.data[..7].copy_from_slice(&[0x48, 0x8d, 0x3d, 0, 0, 0, 0]);
    init.relocations[0] = (3, PC32, ".data".into(), PATCH as i64 - 4);
    assert!(linked(&ko, &FakeKernel::new()).is_ok());
}

/// The error for a module whose init function has this code before the sample's own.
fn init_error(code: &[u8], relocation: Option<(u64, u32, &str, i64)>) -> String {
    let mut ko = sample();
    ko.undefined("__mutex_init", UNDEFINED);
    let init = ko.get(".init.text");
    for relocation in &mut init.relocations {
        relocation.0 += code.len() as u64;
    }
    init.data.splice(0..0, code.iter().copied());
    if let Some((at, kind, symbol, addend)) = relocation {
        init.relocations
            .insert(0, (at, kind, symbol.into(), addend));
    }
    for symbol in &mut ko.symbols {
        if symbol.name == "init_module" {
            symbol.size += code.len() as u64;
        }
    }
    module_error(&ko).to_string()
}

#[test]
fn an_init_function_that_does_more_is_refused_by_what_it_does() {
    for (code, relocation, told) in [
        // call __mutex_init
        (
            &[0xe8, 0, 0, 0, 0][..],
            Some((1, PLT32, "__mutex_init", -4)),
            "it calls __mutex_init",
        ),
        // movb $1, patch+24(%rip)
        (
            &[0xc6, 0x05, 0, 0, 0, 0, 1],
            Some((2, PC32, ".data", PATCH as i64 + 24 - 5)),
            "it stores to patch",
        ),
        // movl $4242, limit(%rip)
        (
            &[0xc7, 0x05, 0, 0, 0, 0, 0x92, 0x10, 0, 0],
            Some((2, PC32, ".bss", -8)),
            "it stores to .bss",
        ),
        // mov %rax, (%rcx)
        (
            &[0x48, 0x89, 0x01],
            None,
            "it stores to memory at init_module+0x0",
        ),
        // test %eax, %eax; je
        (
            &[0x85, 0xc0, 0x74, 0x02],
            None,
            "it branches at init_module+0x2",
        ),
        // mov $-19, %eax; ret
        (
            &[0xb8, 0xed, 0xff, 0xff, 0xff, 0xc3],
            None,
            "it does not call klp_enable_patch",
        ),
        // cli
        (
            &[0xfa],
            None,
            "it has a special instruction at init_module+0x0",
        ),
    ] {
        let error = init_error(code, relocation);
        assert!(error.contains(told), "{error}");
    }
    // What does nothing that lasts: endbr64, a frame, a load.
    let harmless = [
        0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0x48, 0x89, 0xe5, 0x5d, 0x48, 0x8b, 0x01,
    ];
    let mut ko = sample();
    let init = ko.get(".init.text");
    init.relocations
        .iter_mut()
        .for_each(|r| r.0 += harmless.len() as u64);
    init.data.splice(0..0, harmless);
    let size = init.data.len() as u64;
    ko.symbols
        .iter_mut()
        .filter(|s| s.name == "init_module")
        .for_each(|s| s.size = size);
    assert_eq!(parse(&ko.bytes()).unwrap().refusals(), []);
}

#[test]
fn an_exit_function_that_does_anything_is_refused() {
    let with_exit = |code: &[u8], relocation: Option<&str>| {
        let mut ko = sample();
        ko.undefined("del_timer_sync", UNDEFINED);
        let exit = ko.section(".exit.text", AX, code);
        if let Some(symbol) = relocation {
            exit.relocations = vec![(1, PLT32, symbol.into(), -4)];
        }
        ko.symbol("cleanup_module", ".exit.text", 0, code.len() as u64, FUNC);
        ko
    };
    let refusals = |ko: &Ko| parse(&ko.bytes()).unwrap().refusals().to_vec();
    let jump = [0xe9, 0, 0, 0, 0];
    assert!(refusals(&with_exit(&[0xc3], None)).is_empty());
    assert!(refusals(&with_exit(&jump, Some("__x86_return_thunk"))).is_empty());
    let error = module_error(&with_exit(&jump, Some("del_timer_sync")));
    assert!(matches!(&error, ModuleError::Exit(what) if what == "it calls del_timer_sync"));
}

#[test]
fn a_module_without_an_init_function_is_refused() {
    let mut ko = sample();
    ko.symbols.retain(|s| s.name != "init_module");
    assert!(matches!(module_error(&ko), ModuleError::Init(_)));
}
