//! A `.BTF` section with the types that introspection looks up, and no others. Offsets are
//! invented: only this BTF knows them.

/// Writes type records and strings.
#[derive(Default)]
struct Writer {
    types: Vec<u8>,
    strings: Vec<u8>,
    last: u32,
}

impl Writer {
    fn name(&mut self, name: &str) -> u32 {
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

    fn record(&mut self, name: &str, kind: u32, vlen: usize, size: u32) -> u32 {
        let name = self.name(name);
        self.words(&[name, kind << 24 | vlen as u32, size]);
        self.last += 1;
        self.last
    }

    fn int(&mut self, name: &str, size: u32) -> u32 {
        let id = self.record(name, 1, 0, size);
        self.words(&[8 * size]);
        id
    }

    fn array(&mut self, element: u32, count: u32) -> u32 {
        let id = self.record("", 3, 0, 0);
        self.words(&[element, element, count]);
        id
    }

    /// Writes a structure; a member has a name, a type and an offset in bytes.
    fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        let id = self.record(name, 4, members.len(), size);
        for (name, kind, offset) in members {
            let name = self.name(name);
            self.words(&[name, *kind, 8 * offset]);
        }
        id
    }

    fn values(&mut self, name: &str, values: &[(&str, u32)]) {
        self.record(name, 6, values.len(), 4);
        for (name, value) in values {
            let name = self.name(name);
            self.words(&[name, *value]);
        }
    }

    fn finish(self) -> Vec<u8> {
        let types = self.types.len() as u32;
        let mut out = Vec::new();
        for word in [0x0001_eb9f, 24, 0, types, types, self.strings.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend(self.types);
        out.extend(self.strings);
        out
    }
}

/// Types that others are made of.
struct Basic {
    byte: u32,
    word: u32,
    long: u32,
    list: u32,
}

/// The `.BTF` section.
pub fn section() -> Vec<u8> {
    let mut w = Writer::default();
    w.name("");
    let basic = Basic {
        byte: w.int("char", 1),
        word: w.int("int", 4),
        long: w.int("long", 8),
        list: 4,
    };
    let long = basic.long;
    w.structure("list_head", 16, &[("next", long, 0), ("prev", long, 8)]);
    task(&mut w, &basic);
    module(&mut w, &basic);
    runtime_code(&mut w, &basic);
    stacks(&mut w, &basic);
    tracers(&mut w, &basic);
    locks(&mut w, &basic);
    w.values(
        "system_states",
        &[("SYSTEM_BOOTING", 0), ("SYSTEM_RUNNING", 2)],
    );
    w.finish()
}

fn task(w: &mut Writer, basic: &Basic) {
    let &Basic {
        byte,
        word,
        long,
        list,
    } = basic;
    let info = w.structure("thread_info", 24, &[("flags", long, 0), ("cpu", word, 16)]);
    let thread = w.structure("thread_struct", 8, &[("sp", long, 0)]);
    let comm = w.array(byte, 16);
    let hooks = w.structure("llist_head", 8, &[("first", long, 0)]);
    let members = [
        ("thread_info", info, 0),
        ("__state", word, 24),
        ("stack", long, 32),
        ("flags", word, 44),
        ("on_cpu", word, 48),
        ("exit_state", word, 56),
        ("pid", word, 60),
        ("tgid", word, 64),
        ("stack_refcount", word, 68),
        ("tasks", list, 72),
        ("thread_node", list, 88),
        ("signal", long, 112),
        ("patch_state", word, 140),
        ("nvcsw", long, 144),
        ("nivcsw", long, 152),
        ("comm", comm, 160),
        ("thread", thread, 176),
        ("start_time", long, 184),
        ("rethooks", hooks, 192),
        ("ret_stack", long, 200),
        ("curr_ret_stack", word, 208),
    ];
    w.structure("task_struct", 216, &members);
    w.structure("signal_struct", 16, &[("thread_head", list, 0)]);
}

fn module(w: &mut Writer, basic: &Basic) {
    let &Basic {
        byte,
        word,
        long,
        list,
    } = basic;
    let name = w.array(byte, 56);
    let memory = w.structure("module_memory", 16, &[("base", long, 0), ("size", word, 8)]);
    let memories = w.array(memory, 7);
    let orc = [
        ("num_orcs", word, 0),
        ("orc_unwind_ip", long, 8),
        ("orc_unwind", long, 16),
    ];
    let arch = w.structure("mod_arch_specific", 24, &orc);
    let members = [
        ("state", word, 0),
        ("list", list, 8),
        ("name", name, 24),
        ("mem", memories, 80),
        ("kallsyms", long, 192),
        ("arch", arch, 200),
        ("syms", long, 224),
        ("num_syms", word, 232),
    ];
    w.structure("module", 240, &members);
    let export = [("value_offset", word, 0), ("name_offset", word, 4)];
    w.structure("kernel_symbol", 12, &export);
    let symbols = [
        ("symtab", long, 0),
        ("num_symtab", word, 8),
        ("strtab", long, 16),
        ("typetab", long, 24),
    ];
    w.structure("mod_kallsyms", 32, &symbols);
    w.values("mod_mem_type", &[("MOD_TEXT", 0), ("MOD_INIT_TEXT", 4)]);
}

/// Code that the kernel generates at run time.
fn runtime_code(w: &mut Writer, basic: &Basic) {
    let &Basic {
        byte, long, list, ..
    } = basic;
    let name = w.array(byte, 512);
    let ops = [("list", list, 0), ("trampoline", long, 16)];
    w.structure("ftrace_ops", 24, &ops);
    let ksym = [("start", long, 0), ("lnode", list, 8), ("name", name, 24)];
    w.structure("bpf_ksym", 536, &ksym);
    let cache = [("pages", list, 0), ("sym", long, 16)];
    w.structure("kprobe_insn_cache", 24, &cache);
    let page = [("list", list, 0), ("insns", long, 16)];
    w.structure("kprobe_insn_page", 24, &page);
}

fn stacks(w: &mut Writer, basic: &Basic) {
    let long = basic.long;
    w.structure(
        "inactive_task_frame",
        16,
        &[("bp", long, 0), ("ret_addr", long, 8)],
    );
    w.structure("irq_stack", 0x4000, &[("stack", long, 0)]);
    let page = w.structure("entry_stack_page", 0x1000, &[("stack", long, 0)]);
    let stack = w.array(long, 0x400);
    let exceptions = [("DF_stack", stack, 0x1000), ("NMI_stack", stack, 0x4000)];
    let exceptions = w.structure("cea_exception_stacks", 0x8000, &exceptions);
    let area = [
        ("entry_stack_page", page, 0x1000),
        ("estacks", exceptions, 0x2000),
    ];
    w.structure("cpu_entry_area", 0xa000, &area);
}

/// The records of return addresses that tracers have replaced.
fn tracers(w: &mut Writer, basic: &Basic) {
    let long = basic.long;
    let link = w.structure("llist_node", 8, &[("next", long, 0)]);
    let node = [
        ("llist", link, 16),
        ("ret_addr", long, 32),
        ("frame", long, 40),
    ];
    w.structure("rethook_node", 48, &node);
    let entry = [("ret", long, 0), ("func", long, 8), ("retp", long, 16)];
    w.structure("ftrace_ret_stack", 24, &entry);
}

fn locks(w: &mut Writer, basic: &Basic) {
    let &Basic { byte, long, .. } = basic;
    w.structure("mutex", 16, &[("owner", long, 0)]);
    w.structure("qrwlock", 8, &[("wlocked", byte, 0)]);
}
