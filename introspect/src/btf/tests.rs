//! Builds BTF, and corrupts it in many ways.

use proptest::prelude::*;

use super::*;

/// Writes type records and strings.
#[derive(Default)]
struct Writer {
    types: Vec<u8>,
    strings: Vec<u8>,
}

impl Writer {
    fn name(&mut self, name: &str) -> u32 {
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        if name.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(name.bytes());
        self.strings.push(0);
        at
    }

    fn words(&mut self, words: &[u32]) {
        for word in words {
            self.types.extend(word.to_le_bytes());
        }
    }

    fn record(&mut self, name: &str, kind: u32, flag: bool, vlen: u32, size: u32) {
        let name = self.name(name);
        self.words(&[name, u32::from(flag) << 31 | kind << 24 | vlen, size]);
    }

    fn finish(self) -> Vec<u8> {
        let mut out = Vec::new();
        let types = self.types.len() as u32;
        for word in [0x0001_eb9f, 24, 0, types, types, self.strings.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend(self.types);
        out.extend(self.strings);
        out
    }
}

fn sample() -> Vec<u8> {
    let mut w = Writer::default();
    w.record("int", 1, false, 0, 4); // 1
    w.words(&[32]);
    w.record("", 2, false, 0, 1); // 2: int *
    w.record("s32", 8, false, 0, 1); // 3: typedef
    w.record("", 10, false, 0, 3); // 4: const s32
    w.record("", 3, false, 0, 0); // 5: s32[6]
    w.words(&[4, 1, 6]);
    w.record("", 5, false, 2, 8); // 6: union { int *p; s32 low; }
    let (p, low) = (w.name("p"), w.name("low"));
    w.words(&[p, 2, 0, low, 3, 0]);
    w.record("inner", 4, false, 2, 16); // 7: struct inner { int a; union; }
    let a = w.name("a");
    w.words(&[a, 1, 0, 0, 6, 64]);
    w.record("outer", 4, true, 4, 64); // 8: with bit fields
    let (first, inner, many, flag) = (
        w.name("first"),
        w.name("inner"),
        w.name("many"),
        w.name("flag"),
    );
    w.words(&[
        first,
        1,
        0,
        inner,
        7,
        64,
        many,
        5,
        192,
        flag,
        1,
        3 << 24 | 389,
    ]);
    w.record("state", 6, false, 2, 4); // 9
    let (idle, done) = (w.name("STATE_IDLE"), w.name("STATE_DONE"));
    w.words(&[idle, -1i32 as u32, done, 7]);
    w.record("wide", 19, false, 1, 8); // 10
    let huge = w.name("WIDE_HUGE");
    w.words(&[huge, 5, 1]);
    w.record("counter", 14, false, 0, 1); // 11
    w.words(&[1]);
    w.record(".data..percpu", 15, false, 1, 64); // 12
    w.words(&[11, 40, 4]);
    w.record("outer", 4, false, 1, 8); // 13: another of that name
    let only = w.name("only_here");
    w.words(&[only, 1, 32]);
    w.record("loop_a", 8, false, 0, 15); // 14
    w.record("loop_b", 8, false, 0, 14); // 15
    w.record("bad", 4, false, 1, 8); // 16
    let it = w.name("it");
    w.words(&[it, 14, 0]);
    w.finish()
}

#[test]
fn paths_lead_to_members() {
    let btf = Btf::parse(sample()).unwrap();
    let at = |path| btf.field(path).map(|f| (f.offset, f.size));
    assert_eq!(at("outer.first"), Ok((0, 4)));
    assert_eq!(at("outer.inner.a"), Ok((8, 4)));
    assert_eq!(at("outer.inner.p"), Ok((16, 8)));
    assert_eq!(at("outer.inner.low"), Ok((16, 4)));
    assert_eq!(at("outer.only_here"), Ok((4, 4)));
    assert_eq!(at("inner"), Ok((0, 16)));
    assert_eq!(btf.size_of("outer"), Ok(64));
    let many = btf.member("outer.many").unwrap();
    assert_eq!(
        (many.offset, many.size, many.count, many.element()),
        (24, 24, Some(6), 4)
    );
    let flag = btf.member("outer.flag").unwrap();
    assert_eq!((flag.offset, flag.size), (48, 1));
    assert_eq!(flag.bits, Some(Bits { shift: 5, width: 3 }));
    assert_eq!(
        btf.first_field(&["outer.absent", "outer.first"])
            .unwrap()
            .offset,
        0
    );
}

#[test]
fn enumerators_and_percpu_variables_are_found() {
    let btf = Btf::parse(sample()).unwrap();
    assert_eq!(btf.enum_value("STATE_IDLE"), Ok(-1));
    assert_eq!(btf.enum_value("STATE_DONE"), Ok(7));
    assert_eq!(btf.enum_value("WIDE_HUGE"), Ok(0x1_0000_0005));
    let variables: Vec<_> = btf.percpu_vars().collect();
    assert_eq!(variables, [("counter".to_owned(), 40, 4)]);
}

#[test]
fn the_error_names_what_is_missing() {
    let btf = Btf::parse(sample()).unwrap();
    assert_eq!(
        btf.field("nothing.a").unwrap_err().to_string(),
        "the guest kernel has no type nothing"
    );
    assert_eq!(
        btf.field("inner.b.c").unwrap_err().to_string(),
        "the guest kernel has no inner.b.c: no member b"
    );
    assert!(btf.enum_value("STATE_LOST").is_err());
    assert_eq!(btf.field("bad.it"), Err(BtfError::Malformed(14)));
    assert_eq!(
        btf.first_field(&["outer.x", "outer.y"])
            .unwrap_err()
            .to_string(),
        "the guest kernel has no outer.x: no member x"
    );
}

#[test]
fn the_error_names_the_corruption() {
    let good = sample();
    assert!(matches!(Btf::parse(Vec::new()), Err(BtfError::Header(_))));
    assert!(matches!(
        Btf::parse(good[..100].to_vec()),
        Err(BtfError::Header(_))
    ));
    let mut bad = good.clone();
    bad[0] = 0;
    assert_eq!(
        Btf::parse(bad).unwrap_err(),
        BtfError::Header("wrong magic number")
    );
    let mut bad = good.clone();
    bad[24 + 7] = 30;
    assert_eq!(
        Btf::parse(bad).unwrap_err(),
        BtfError::UnknownKind { id: 1, kind: 30 }
    );
    let mut bad = good;
    bad[24 + 4] = 0xff;
    bad[24 + 7] = 4;
    bad[24 + 5] = 0xff;
    assert_eq!(Btf::parse(bad).unwrap_err(), BtfError::Truncated(1));
}

/// Ten seconds are a hundred times what each of these takes, and a fraction of what it would take
/// without the bound.
fn in_time<T>(work: impl FnOnce() -> T) -> T {
    let start = std::time::Instant::now();
    let out = work();
    assert!(start.elapsed().as_secs() < 10, "took {:?}", start.elapsed());
    out
}

/// `count` structures without members, all of one name.
fn many_of_one_name(w: &mut Writer, name: &str, count: u32) {
    let name = w.name(name);
    for _ in 0..count {
        w.words(&[name, 4 << 24, 8]);
    }
}

#[test]
fn a_string_without_end_is_not_read_once_for_each_type() {
    let mut w = Writer::default();
    many_of_one_name(&mut w, &"n".repeat(8 << 20), 200_000);
    w.strings.pop();
    in_time(|| Btf::parse(w.finish()).unwrap().has("nothing"));
}

#[test]
fn long_names_shared_by_many_types_are_refused() {
    let mut w = Writer::default();
    many_of_one_name(&mut w, &"n".repeat(511), 100_000);
    let error = in_time(|| Btf::parse(w.finish()).unwrap_err());
    assert_eq!(error, BtfError::Header("its names are too long"));
}

#[test]
fn many_structures_of_one_name_do_not_multiply_the_cost_of_one() {
    let mut w = Writer::default();
    let (name, junk) = (w.name("task_struct"), w.name("junk"));
    // Type 1 has as many members as a type can have; all others are `task_struct { struct { … }; }`
    // around it.
    w.words(&[0, 4 << 24 | 60_000, 8]);
    for _ in 0..60_000 {
        w.words(&[junk, 0, 0]);
    }
    for _ in 0..100_000 {
        w.words(&[name, 4 << 24 | 1, 8, 0, 1, 0]);
    }
    let btf = Btf::parse(w.finish()).unwrap();
    assert!(in_time(|| btf.member("task_struct.pid")).is_err());
}

#[test]
fn a_structure_inside_itself_ends() {
    let mut w = Writer::default();
    let (name, junk) = (w.name("task_struct"), w.name("junk"));
    w.words(&[name, 4 << 24 | 3, 8, 0, 1, 0, 0, 2, 0, junk, 1, 0]);
    w.words(&[0, 5 << 24 | 2, 8, 0, 1, 0, 0, 2, 0]);
    let btf = Btf::parse(w.finish()).unwrap();
    assert_eq!(
        in_time(|| btf.member("task_struct.pid")),
        Err(BtfError::Malformed(2))
    );
}

proptest! {
    #[test]
    fn no_corruption_panics(
        at in any::<prop::sample::Index>(),
        junk in proptest::collection::vec(any::<u8>(), 1..32),
    ) {
        let mut bytes = sample();
        let at = at.index(bytes.len());
        let len = junk.len().min(bytes.len() - at);
        bytes[at..at + len].copy_from_slice(&junk[..len]);
        if let Ok(btf) = Btf::parse(bytes) {
            let paths = [
                "outer.first",
                "outer.inner.p",
                "outer.many",
                "outer.flag",
                "bad.it",
                "outer.only_here",
            ];
            for path in paths {
                let _ = btf.member(path);
            }
            let _ = btf.enum_value("WIDE_HUGE");
            let _ = btf.percpu_vars().count();
        }
    }
}
