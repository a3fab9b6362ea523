//! The kernel's tables in a made-up guest, with a layout that no kernel has.

use introspect::{Field, Gva, GvaRange};
use proptest::prelude::*;

use super::*;
use crate::machine::Machine;
use crate::machine::mock::Mock;
use crate::registration::layout::{
    KallsymsFields, ListLayout, MemoryFields, ModuleFields, PartFields, RbNodeLayout, TreeLayout,
};
use crate::registration::rb_tree;

const BASE: Gva = Gva(0xffff_8880_0000_0000);
const PAGES: u64 = 16;
/// Bytes of a made-up `struct module`.
const MODULE: u64 = 256;
/// Where the modules of the guest are.
const MODULES: Gva = BASE.add(0x1000);

fn field(offset: u64, size: u64) -> Field {
    Field { offset, size }
}

/// A range's node is its `struct mod_tree_node`'s second member: 48 bytes after the range.
fn part(at: u64) -> PartFields {
    PartFields {
        base: field(at, 8),
        size: field(at + 8, 4),
        owner: field(at + 16, 8),
        node: field(at + 24, 48),
    }
}

fn layout() -> RegistrationLayout {
    let unused = field(0, 8);
    RegistrationLayout {
        module: ModuleFields {
            size: MODULE,
            state: field(0, 4),
            registered: 0,
            name: field(8, 24),
            lists: vec![field(32, 16)],
            bug_list: field(32, 16),
            bug_table: unused,
            num_bugs: unused,
            extable: unused,
            num_exentries: unused,
            refcnt: Some(field(4, 4)),
            kallsyms: unused,
            core_kallsyms: KallsymsFields {
                whole: unused,
                symtab: unused,
                num_symtab: unused,
                strtab: unused,
                typetab: unused,
            },
            orc: [unused; 3],
            memory: MemoryFields::Memories {
                text: part(48),
                rodata: part(120),
                data: part(184),
            },
        },
        tree: TreeLayout {
            seq: BASE,
            roots: [BASE.add(8), BASE.add(16)],
            addr_min: BASE.add(24),
            addr_max: BASE.add(32),
            base: -24,
            size: (-16, field(8, 4)),
            rb_node: RbNodeLayout {
                size: 24,
                parent_color: field(0, 8),
                left: field(16, 8),
                right: field(8, 8),
            },
        },
        bug_list: ListLayout {
            head: BASE.add(48),
            next: field(0, 8),
            prev: field(8, 8),
        },
        gp_seq: BASE.add(64),
        kprobes: None,
    }
}

/// A guest without modules.
fn machine() -> Mock {
    let mut machine = Mock::new((Mock::FREE + PAGES * 0x1000) as usize);
    for page in 0..PAGES {
        machine.map(BASE.add(page * 0x1000), Mock::FREE + page * 0x1000, 0x3);
    }
    put(&mut machine, BASE, &[4, 0, u64::MAX, 0]);
    let at = layout().bug_list.head;
    put(&mut machine, at, &[at.0, at.0]);
    put(&mut machine, BASE.add(8), &[0, 0, u64::MAX, 0]);
    machine
}

fn put(machine: &mut Mock, at: Gva, words: &[u64]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    machine.put(Mock::FREE + at.since(BASE), &bytes);
}

/// A module with its code at `start`, and its `struct module` in the guest.
fn module(machine: &mut Mock, number: u64, start: u64) -> Registration {
    let at = MODULES.add(number * MODULE);
    let memory = ModuleMemory {
        text: GvaRange::new(Gva(start), Gva(start + 0x10)),
        rodata: GvaRange::default(),
        data: GvaRange::new(Gva(start + 0x20), Gva(start + 0x30)),
    };
    put(machine, at.add(48), &[start, 0x10]);
    put(machine, at.add(184), &[start + 0x20, 0x10]);
    Registration::new(&layout(), at, &memory)
}

fn change(
    machine: &mut Mock,
    add: &[&Registration],
    remove: &[&Registration],
) -> Result<(), StepError> {
    let mut writes = WriteBatch::new();
    let memory = PatchMemory::default();
    plan(
        &machine.kernel_memory(),
        &layout(),
        &memory,
        (add, remove),
        &mut writes,
    )?;
    machine.pause().unwrap();
    writes.commit(machine).unwrap();
    machine.resume().unwrap();
    Ok(())
}

/// The nodes of both trees, and the links of the list.
fn present(machine: &Mock) -> ([Vec<Gva>; 2], Vec<Gva>) {
    let memory = machine.kernel_memory();
    let TreeLayout { roots, rb_node, .. } = layout().tree;
    let trees = roots.map(|root| {
        let nodes = rb_tree::in_order(&memory, &rb_node, root, 1000).unwrap();
        nodes.iter().map(|node| node.at).collect()
    });
    let head = layout().bug_list.head;
    let mut links = Vec::new();
    let mut at = memory.pointer(head).unwrap();
    while at != head {
        links.push(at);
        at = memory.pointer(at).unwrap();
    }
    (trees, links)
}

fn text_of(error: StepError) -> String {
    match error {
        StepError::Failed(error) => error.to_string(),
        StepError::Busy(why) => panic!("busy: {why}"),
    }
}

#[test]
fn a_module_comes_and_goes() {
    let mut machine = machine();
    let one = module(&mut machine, 0, 0x5000);
    change(&mut machine, &[&one], &[]).unwrap();
    let nodes: Vec<Gva> = one.nodes.iter().map(|node| node.at).collect();
    assert_eq!(nodes.len(), 2, "the empty range has none");
    let shifted = nodes.iter().map(|at| at.add(24)).collect();
    assert_eq!(present(&machine), ([nodes, shifted], vec![one.bug_link]));
    let memory = machine.kernel_memory();
    assert_eq!(
        memory.u32(BASE).unwrap(),
        6,
        "the sequence count keeps its parity"
    );
    assert_eq!(memory.u64(BASE.add(24)).unwrap(), 0x5000);
    assert_eq!(memory.u64(BASE.add(32)).unwrap(), 0x5030);
    let next = memory.pointer(one.bug_link).unwrap();

    change(&mut machine, &[], &[&one]).unwrap();
    assert_eq!(present(&machine), ([vec![], vec![]], vec![]));
    let memory = machine.kernel_memory();
    assert_eq!(memory.u32(BASE).unwrap(), 8);
    assert_eq!(memory.u64(BASE.add(32)).unwrap(), 0x5030, "the bounds stay");
    assert_eq!(
        memory.pointer(one.bug_link).unwrap(),
        next,
        "a reader goes on from it"
    );
}

#[test]
fn what_is_no_table_of_the_kernel_is_refused() {
    let mut machine = machine();
    let (one, two) = (
        module(&mut machine, 0, 0x5000),
        module(&mut machine, 1, 0x5008),
    );
    change(&mut machine, &[&one], &[]).unwrap();
    let refused = |machine: &Mock, add: &[&Registration], remove: &[&Registration]| {
        let mut copy = self::machine();
        copy.ram = machine.ram.clone();
        let error = text_of(change(&mut copy, add, remove).unwrap_err());
        assert_eq!(copy.ram, machine.ram, "nothing is written");
        error
    };
    assert!(refused(&machine, &[&two], &[]).contains("overlap"));
    assert!(refused(&machine, &[], &[&two]).contains("lacks the node"));
    let far = module(&mut machine, 2, 0x9000);
    let mut broken = |at: Gva, word: u64, why: &str| {
        let old = machine.kernel_memory().u64(at).unwrap();
        put(&mut machine, at, &[word]);
        let error = refused(&machine, &[&far], &[]);
        assert!(error.contains(why), "{error}");
        put(&mut machine, at, &[old]);
    };
    let root = one.nodes[1].at;
    // A cycle to the left, and one to the right.
    broken(root.add(16), root.0, "deeper");
    broken(root.add(8), root.0, "more nodes");
    broken(BASE.add(16), 0, "differ");
    broken(root.add(8), 0x10, "cannot read");
    broken(one.bug_link, one.bug_link.0, "broken after");
    broken(layout().bug_list.head, 0x10, "cannot read");
}

#[test]
fn other_users_of_the_code_are_found() {
    let mut machine = machine();
    let one = module(&mut machine, 0, MODULES.0 + 0x1000);
    let text = [0x90; 16];
    machine.put(Mock::FREE + 0x2000, &text);
    let user = |machine: &Mock, kprobes: Option<&KprobeTable>| {
        one.user(&machine.kernel_memory(), kprobes, &text).unwrap()
    };
    for (count, expected) in [(3, 3), (0, 0)] {
        put(&mut machine, MODULES, &[count << 32]);
        let found = CodeUser::Reference { count: expected };
        assert_eq!(user(&machine, None), Some(found));
    }
    put(&mut machine, MODULES, &[2 << 32]);
    assert_eq!(user(&machine, None), None);
    machine.put(Mock::FREE + 0x2005, &[0xcc]);
    assert_eq!(
        user(&machine, None),
        Some(CodeUser::Changed(one.code.start.add(5)))
    );
    machine.put(Mock::FREE + 0x2005, &[0x90]);
    // Two buckets; two probes in the second.
    let table = BASE.add(0x3000);
    let [first, second] = [BASE.add(0x3100), BASE.add(0x3200)];
    let kprobes = KprobeTable {
        table: GvaRange::new(table, table.add(16)),
        next: field(0, 8),
        link: field(8, 16),
        addr: field(32, 8),
    };
    put(&mut machine, table, &[0, first.add(8).0]);
    put(
        &mut machine,
        first,
        &[0, second.add(8).0, 0, 0, one.code.end.0],
    );
    put(&mut machine, second, &[0, 0, 0, 0, one.code.end.0]);
    assert_eq!(user(&machine, Some(&kprobes)), None);
    let inside = one.code.start.add(3);
    put(&mut machine, second.add(32), &[inside.0]);
    assert_eq!(
        user(&machine, Some(&kprobes)),
        Some(CodeUser::Kprobe(inside))
    );
    // A table that does not end.
    put(&mut machine, second.add(32), &[0]);
    put(&mut machine, second.add(8), &[second.add(8).0]);
    let error = one
        .user(&machine.kernel_memory(), Some(&kprobes), &text)
        .unwrap_err();
    assert!(text_of(error).contains("does not end"));
}

proptest! {
    #[test]
    fn the_tables_hold_what_is_registered(
        changes in proptest::collection::vec((0u64..40, any::<bool>()), 1..30),
    ) {
        let mut machine = machine();
        let all: Vec<Registration> =
            (0..40).map(|i| module(&mut machine, i, 0x10_0000 + (i * 7 % 40) * 0x100)).collect();
        let mut registered: Vec<usize> = Vec::new();
        for (number, several) in changes {
            let number = number as usize;
            let (mut add, mut remove) = (Vec::new(), Vec::new());
            match registered.contains(&number) {
                true => remove.push(number),
                false => add.push(number),
            }
            if several {
                let others = registered.iter().filter(|other| **other != number).take(3);
                remove.extend(others.copied());
            }
            registered.retain(|other| !remove.contains(other));
            registered.splice(0..0, add.iter().copied());
            let refs = |of: &[usize]| of.iter().map(|i| &all[*i]).collect::<Vec<_>>();
            change(&mut machine, &refs(&add), &refs(&remove)).unwrap();
            let ([first, second], links) = present(&machine);
            let mut nodes: Vec<&TreeNode> =
                registered.iter().flat_map(|i| &all[*i].nodes).collect();
            nodes.sort_by_key(|node| node.range.start);
            let expected: Vec<Gva> = nodes.iter().map(|node| node.at).collect();
            prop_assert_eq!(&first, &expected);
            let shifted: Vec<Gva> = expected.iter().map(|at| at.add(24)).collect();
            prop_assert_eq!(&second, &shifted);
            let expected: Vec<Gva> = registered.iter().map(|i| all[*i].bug_link).collect();
            prop_assert_eq!(&links, &expected);
        }
    }
}
