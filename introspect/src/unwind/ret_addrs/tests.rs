//! Records of each form, whole and damaged.

use std::collections::HashMap;

use super::hooks::{List, hash};
use super::*;
use crate::memory::kernel::Field;

pub(crate) const TASK: Gva = Gva(0xffff_8880_0001_0000);
const RECORDS: Gva = Gva(0xffff_8880_0002_0000);
const TABLE: Gva = Gva(0xffff_ffff_8300_0000);
pub(crate) const GRAPH: Gva = Gva(0xffff_ffff_8100_0600);
pub(crate) const HOOK: Gva = Gva(0xffff_ffff_8100_0640);
const RET: Gva = Gva(0xffff_ffff_8100_0040);
const RETP: Gva = Gva(0xffff_c900_0000_3f00);

/// Guest memory of words.
#[derive(Clone, Default)]
pub(crate) struct Words(HashMap<u64, u64>);

impl Words {
    fn put(&mut self, at: Gva, value: u64) -> &mut Self {
        self.0.insert(at.0, value);
        self
    }
}

impl ReadMemory for Words {
    fn read_virtual(&self, at: Gva, buf: &mut [u8]) -> Result<(), Gva> {
        let word = self.0.get(&(at.0 & !7)).ok_or(at)?.to_le_bytes();
        let from = usize::try_from(at.0 & 7).map_err(|_| at)?;
        let word = word.get(from..from + buf.len()).ok_or(at)?;
        buf.copy_from_slice(word);
        Ok(())
    }
}

const fn word(offset: u64) -> Field {
    Field { offset, size: 8 }
}

/// `ftrace_ret_stack` is `ret`, `func`, `retp`.
pub(crate) fn graph(words: bool) -> TracerRecords {
    let ret_stack = RetStack {
        ret_stack: word(0x10),
        curr_ret_stack: Field {
            offset: 0x1c,
            size: 4,
        },
        ret: word(0),
        retp: word(0x10),
        size: 0x18,
        words,
    };
    let sources = vec![(GRAPH, Source::RetStack(ret_stack))];
    TracerRecords { sources }
}

/// A record is its link, `ret_addr`, `frame` and `task`.
fn hooks(list: List) -> TracerRecords {
    let hooks = Hooks {
        list,
        link: word(0),
        ret_addr: word(8),
        frame: word(0x10),
    };
    let sources = vec![(HOOK, Source::Hooks(hooks))];
    TracerRecords { sources }
}

/// Records of the graph tracer in the array of structures, the latest last.
fn structures(records: &[(Gva, Gva)]) -> Words {
    let mut words = Words::default();
    let current = u64::from((records.len() as u32).wrapping_sub(1));
    words.put(TASK.add(0x18), current << 32);
    words.put(TASK.add(0x10), RECORDS.0);
    for ((retp, ret), i) in records.iter().zip(0u64..) {
        let at = RECORDS.add(0x18 * i);
        words.put(at, ret.0).put(at.add(0x10), retp.0);
    }
    words
}

/// The same in the array of words: each record has this many words of data behind it.
fn shadow_stack(records: &[(Gva, Gva)], data: u64) -> Words {
    let mut words = Words::default();
    words.put(TASK.add(0x10), RECORDS.0);
    let mut used = 0;
    for (retp, ret) in records {
        let at = RECORDS.add(8 * used);
        words.put(at, ret.0).put(at.add(0x10), retp.0);
        words.put(at.add(0x18), 1 << 12 | 1 << 10 | 3);
        used += 4;
        if data != 0 {
            used += data + 1;
            let last = RECORDS.add(8 * (used - 1));
            words.put(last, (data - 1) << 12 | 2 << 10 | (3 + data + 1));
        }
    }
    words.put(TASK.add(0x18), used << 32);
    words
}

/// Records in a list that begins at `head`, the latest first.
fn linked(head: Gva, records: &[(Gva, Gva)]) -> Words {
    let mut words = Words::default();
    let mut link = head;
    for ((retp, ret), i) in records.iter().zip(0u64..) {
        let at = RECORDS.add(0x20 * i);
        words.put(link, at.0);
        words.put(at.add(8), ret.0).put(at.add(0x10), retp.0);
        link = at;
    }
    words.put(link, 0);
    words
}

/// The same in the table of all tasks. Each record is of one task.
fn in_table(records: &[(Gva, Gva, Gva)]) -> Words {
    let all: Vec<_> = records.iter().map(|(retp, ret, _)| (*retp, *ret)).collect();
    let mut words = linked(TABLE.add(8 * hash(TASK)), &all);
    for ((_, _, owner), i) in records.iter().zip(0u64..) {
        words.put(RECORDS.add(0x20 * i + 0x18), owner.0);
    }
    words
}

fn of<'a>(records: &'a TracerRecords, words: &'a Words) -> RetAddrs<'a, Words> {
    RetAddrs::new(records, words, TASK, false)
}

/// Recovers addresses at these places, in this order.
fn recover(records: &TracerRecords, words: &Words, retps: &[Gva]) -> Vec<Option<Gva>> {
    let trampoline = records.sources[0].0;
    let mut addrs = of(records, words);
    retps
        .iter()
        .map(|retp| addrs.recover(trampoline, *retp))
        .collect()
}

/// Two records, with the place and the address of each, the inner function's first.
const INNER: (Gva, Gva) = (RETP, RET);
const OUTER: (Gva, Gva) = (RETP.add(0x40), RET.add(0x10));

/// The records of every form, in memory that is good.
fn all_forms() -> Vec<(TracerRecords, Words)> {
    let task_list = List::OfTask(word(0x28));
    let table = List::Table(TABLE, word(0x18));
    let both = [INNER, OUTER].map(|(retp, ret)| (retp, ret, TASK));
    vec![
        (graph(false), structures(&[OUTER, INNER])),
        (graph(true), shadow_stack(&[OUTER, INNER], 0)),
        (graph(true), shadow_stack(&[OUTER, INNER], 2)),
        (hooks(task_list), linked(TASK.add(0x28), &[INNER, OUTER])),
        (hooks(table), in_table(&both)),
    ]
}

#[test]
fn addresses_are_recovered_from_the_inside_out_and_none_is_left() {
    for (records, words) in all_forms() {
        let trampoline = records.sources[0].0;
        let mut addrs = of(&records, &words);
        assert_eq!(addrs.unused(), None, "no trampoline was met");
        assert_eq!(addrs.recover(trampoline, INNER.0), Some(INNER.1));
        assert_eq!(addrs.unused(), Some(trampoline));
        assert_eq!(addrs.recover(trampoline, OUTER.0), Some(OUTER.1));
        assert_eq!(addrs.unused(), None);
        assert_eq!(addrs.recover(trampoline, OUTER.0), None);
        assert_eq!(addrs.recover(Gva(trampoline.0 + 8), OUTER.0), None);
    }
}

#[test]
fn a_record_of_another_place_is_not_passed_over() {
    for (records, words) in all_forms() {
        assert_eq!(recover(&records, &words, &[OUTER.0]), [None]);
        assert_eq!(recover(&records, &words, &[INNER.0.add(8)]), [None]);
    }
}

#[test]
fn memory_that_cannot_be_read_has_no_records() {
    for (records, words) in all_forms() {
        for at in words.0.keys() {
            let mut damaged = words.clone();
            damaged.0.remove(at);
            let found = recover(&records, &damaged, &[INNER.0, OUTER.0]);
            assert!(found.contains(&None), "{at:#x} is not read");
        }
    }
}

#[test]
fn damage_never_yields_another_address_for_a_place() {
    for (records, words) in all_forms() {
        let values = [0, 1, 7, u64::MAX, 1 << 32, 1 << 62, RECORDS.0, TASK.0];
        for at in words.0.keys() {
            for value in values {
                let mut damaged = words.clone();
                damaged.put(Gva(*at), value);
                let found = recover(&records, &damaged, &[INNER.0, OUTER.0]);
                let expected = [INNER.1, OUTER.1];
                let wrong = found.iter().zip(expected).any(|(found, expected)| {
                    found.is_some_and(|found| found != expected && found.0 != value)
                });
                assert!(!wrong, "{at:#x}: {value:#x}: {found:?}");
            }
        }
    }
}

#[test]
fn huge_and_negative_indices_end_at_once() {
    for words in [false, true] {
        for current in [i32::MIN, -7, -1, 4097, i32::MAX] {
            let mut memory = structures(&[INNER]);
            memory.put(TASK.add(0x18), u64::from(current.cast_unsigned()) << 32);
            assert_eq!(recover(&graph(words), &memory, &[INNER.0]), [None]);
        }
    }
}

#[test]
fn a_function_that_is_being_entered_has_no_address_yet() {
    let mut words = shadow_stack(&[INNER], 0);
    words.put(RECORDS.add(0x18), 3);
    assert_eq!(recover(&graph(true), &words, &[INNER.0]), [None]);
    let records = hooks(List::OfTask(word(0x28)));
    let empty = linked(TASK.add(0x28), &[]);
    assert_eq!(recover(&records, &empty, &[INNER.0]), [None]);
}

#[test]
fn a_word_that_leads_elsewhere_than_to_a_structure_is_refused() {
    for distance in [0, 1, 2, 4, 5, 1023] {
        let mut words = shadow_stack(&[OUTER, INNER], 0);
        words.put(RECORDS.add(8 * 7), 1 << 12 | 1 << 10 | distance);
        assert_eq!(recover(&graph(true), &words, &[INNER.0]), [None]);
    }
}

#[test]
fn lists_with_cycles_end() {
    // A function with probes without end.
    let mut words = linked(TASK.add(0x28), &[(RETP, HOOK)]);
    words.put(RECORDS, RECORDS.0);
    let records = hooks(List::OfTask(word(0x28)));
    let mut addrs = of(&records, &words);
    let recovered = (0..2 * MAX_RECORDS).map_while(|_| addrs.recover(HOOK, RETP));
    assert_eq!(recovered.count(), MAX_RECORDS);
    // A list of the table without a record of the task.
    let mut words = in_table(&[(INNER.0, INNER.1, Gva(7))]);
    words.put(RECORDS, RECORDS.0);
    let records = hooks(List::Table(TABLE, word(0x18)));
    assert_eq!(recover(&records, &words, &[RETP]), [None]);
}

#[test]
fn other_tasks_in_the_table_are_passed_over() {
    let records = hooks(List::Table(TABLE, word(0x18)));
    let other = (RETP, RET.add(0x20), TASK.add(0x1000));
    let [inner, outer] = [INNER, OUTER].map(|(retp, ret)| (retp, ret, TASK));
    let words = in_table(&[other, inner, other, outer, other]);
    let found = recover(&records, &words, &[INNER.0, OUTER.0]);
    assert_eq!(found, [Some(INNER.1), Some(OUTER.1)]);
    assert_eq!(recover(&records, &words, &[INNER.0]), [Some(INNER.1)]);
}

#[test]
fn the_table_of_all_tasks_is_not_used_while_the_guest_runs() {
    for (records, words) in all_forms() {
        let trampoline = records.sources[0].0;
        let mut addrs = RetAddrs::new(&records, &words, TASK, true);
        let found = addrs.recover(trampoline, INNER.0);
        assert_eq!(found.is_none(), records.sources[0].1.is_shared());
    }
}
