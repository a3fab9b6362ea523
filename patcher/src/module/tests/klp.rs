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
    let second_mod = error(&ko, &FakeKernel::new());
    // The decoy's own reference to the module is refused.
    assert!(
        matches!(second_mod, LinkError::Dropped { .. }),
        "{second_mod:?}"
    );
    let module = parse(&ko.bytes()).unwrap();
    assert_eq!(module.patch(&layouts().klp).unwrap().functions.len(), 1);
    // Neither shows it: the code passes something unknown, and there are two structures.
    ko.get(".init.text").relocations.remove(0);
    assert!(matches!(module_error(&ko), ModuleError::Klp(_)));
    // By the symbol alone, when there is one structure.
    let mut ko = sample();
    ko.get(".init.text").relocations.remove(0);
    assert!(linked(&ko, &FakeKernel::new()).is_ok());
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
