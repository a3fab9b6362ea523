//! [`RegistrationLayout`]: where a guest's kernel keeps what it knows of modules by address, and the
//! fields of the structures there, from its symbols and its BTF.
//!
//! This module follows `include/linux/module.h`, `kernel/module/tree_lookup.c`,
//! `include/linux/rbtree_latch.h` and `lib/bug.c`. It knows names of types and members, never
//! numbers.

use introspect::btf::{Btf, BtfError};
use introspect::{Field, Gva, Kernel};

use crate::error::PatchError;
use crate::registration::users::KprobeTable;

/// Where the kernel keeps its tables of modules, and how they are laid out.
#[derive(Clone, Debug)]
pub struct RegistrationLayout {
    /// `struct module`.
    pub module: ModuleFields,
    /// `mod_tree`.
    pub tree: TreeLayout,
    /// `module_bug_list`.
    pub bug_list: ListLayout,
    /// `rcu_state.gp_seq`: the count of grace periods.
    pub gp_seq: Gva,
    /// `kprobe_table`, in a kernel with kprobes.
    pub kprobes: Option<KprobeTable>,
}

/// Fields of `struct module`, and values of them.
#[derive(Clone, Debug)]
pub struct ModuleFields {
    /// `sizeof(struct module)`.
    pub size: u64,
    /// `state`.
    pub state: Field,
    /// The state of a patch: `MODULE_STATE_LIVE`, or `MODULE_STATE_GOING` in a kernel that cannot
    /// change code in hidden windows: for that state it refuses kprobes, and nothing else.
    pub registered: u64,
    /// `name`.
    pub name: Field,
    /// The members that are list heads: they are empty.
    pub lists: Vec<Field>,
    /// `bug_list`.
    pub bug_list: Field,
    /// `bug_table`.
    pub bug_table: Field,
    /// `num_bugs`.
    pub num_bugs: Field,
    /// `extable`.
    pub extable: Field,
    /// `num_exentries`.
    pub num_exentries: Field,
    /// `refcnt`, with `CONFIG_MODULE_UNLOAD`.
    pub refcnt: Option<Field>,
    /// `kallsyms`.
    pub kallsyms: Field,
    /// `core_kallsyms`.
    pub core_kallsyms: KallsymsFields,
    /// `arch.num_orcs`, `arch.orc_unwind_ip` and `arch.orc_unwind`.
    pub orc: [Field; 3],
    /// The parts of its memory that are in the tree.
    pub memory: MemoryFields,
}

/// Fields of `module.core_kallsyms`, by their offset in `struct module`.
#[derive(Clone, Copy, Debug)]
pub struct KallsymsFields {
    /// The structure itself.
    pub whole: Field,
    /// `symtab`.
    pub symtab: Field,
    /// `num_symtab`.
    pub num_symtab: Field,
    /// `strtab`.
    pub strtab: Field,
    /// `typetab`.
    pub typetab: Field,
}

/// The fields of `struct module` that say where its memory is.
#[derive(Clone, Debug)]
pub enum MemoryFields {
    /// `core_layout` (up to 6.3): one range, which begins with the code.
    Layout {
        /// The range.
        part: PartFields,
        /// `text_size`, `ro_size` and `ro_after_init_size`: where the code, and what is read-only,
        /// ends in it.
        sizes: Vec<Field>,
    },
    /// `mem[]` (6.4 on): a range for each type of memory.
    Memories {
        /// `mem[MOD_TEXT]`.
        text: PartFields,
        /// `mem[MOD_RODATA]`.
        rodata: PartFields,
        /// `mem[MOD_DATA]`.
        data: PartFields,
    },
}

/// The fields of one range of a module's memory, by their offset in `struct module`.
#[derive(Clone, Copy, Debug)]
pub struct PartFields {
    /// `base`.
    pub base: Field,
    /// `size`.
    pub size: Field,
    /// `mtn.mod`: the module, for a reader that has found the node.
    pub owner: Field,
    /// `mtn.node`: the node in both trees.
    pub node: Field,
}

/// `mod_tree` (`struct mod_tree_root`) and the nodes in it.
#[derive(Clone, Debug)]
pub struct TreeLayout {
    /// The address of the latch's sequence count, of 32 bits.
    pub seq: Gva,
    /// The addresses of the pointers to the root of each tree.
    pub roots: [Gva; 2],
    /// The address of `addr_min`.
    pub addr_min: Gva,
    /// The address of `addr_max`.
    pub addr_max: Gva,
    /// `base` of a range, by its distance from the range's node.
    pub base: i64,
    /// `size` of a range, by its distance from the range's node.
    pub size: (i64, Field),
    /// `struct rb_node`.
    pub rb_node: RbNodeLayout,
}

/// `struct rb_node`: its three words.
#[derive(Clone, Copy, Debug)]
pub struct RbNodeLayout {
    /// `sizeof(struct rb_node)`: the second tree's node follows the first one's.
    pub size: u64,
    /// `__rb_parent_color`.
    pub parent_color: Field,
    /// `rb_left`.
    pub left: Field,
    /// `rb_right`.
    pub right: Field,
}

/// A list and its links.
#[derive(Clone, Copy, Debug)]
pub struct ListLayout {
    /// The address of its head.
    pub head: Gva,
    /// `list_head.next`.
    pub next: Field,
    /// `list_head.prev`.
    pub prev: Field,
}

impl RegistrationLayout {
    /// Resolves all of it.
    ///
    /// # Errors
    /// [`PatchError::Guest`] with the name of what the kernel lacks.
    pub fn new(kernel: &Kernel) -> Result<RegistrationLayout, PatchError> {
        let (btf, symbols) = (&kernel.btf, &kernel.symbols);
        let rcu_state = symbols.address("rcu_state")?;
        Ok(RegistrationLayout {
            module: module(btf)?,
            tree: tree(btf, symbols.address("mod_tree")?)?,
            bug_list: ListLayout {
                head: symbols.address("module_bug_list")?,
                next: btf.field("list_head.next")?,
                prev: btf.field("list_head.prev")?,
            },
            gp_seq: btf.field("rcu_state.gp_seq")?.of(rcu_state),
            kprobes: KprobeTable::new(kernel)?,
        })
    }
}

fn module(btf: &Btf) -> Result<ModuleFields, BtfError> {
    let field = |name: &str| btf.field(&format!("module.{name}"));
    let lists = ["list", "bug_list", "source_list", "target_list"];
    let kallsyms = |name: &str| field(&format!("core_kallsyms.{name}"));
    Ok(ModuleFields {
        size: btf.size_of("module")?,
        state: field("state")?,
        registered: btf.enum_value(registered_state(btf))?.cast_unsigned(),
        name: field("name")?,
        // The last two are there with CONFIG_MODULE_UNLOAD only.
        lists: lists.iter().filter_map(|name| field(name).ok()).collect(),
        bug_list: field("bug_list")?,
        bug_table: field("bug_table")?,
        num_bugs: field("num_bugs")?,
        extable: field("extable")?,
        num_exentries: field("num_exentries")?,
        refcnt: field("refcnt").ok(),
        kallsyms: field("kallsyms")?,
        core_kallsyms: KallsymsFields {
            whole: field("core_kallsyms")?,
            symtab: kallsyms("symtab")?,
            num_symtab: kallsyms("num_symtab")?,
            strtab: kallsyms("strtab")?,
            typetab: kallsyms("typetab")?,
        },
        orc: [
            field("arch.num_orcs")?,
            field("arch.orc_unwind_ip")?,
            field("arch.orc_unwind")?,
        ],
        memory: memory(btf)?,
    })
}

/// The state of a patch. To change code, a kprobe looks its page up (`mm/vmalloc.c:
/// vmalloc_to_page`). Kernels that have no huge pages there stop with a BUG when they find the 2 MiB
/// page of a hidden window; those that have them say so in `struct vm_struct`.
fn registered_state(btf: &Btf) -> &'static str {
    match btf.field("vm_struct.page_order") {
        Ok(_) => "MODULE_STATE_LIVE",
        Err(_) => "MODULE_STATE_GOING",
    }
}

fn memory(btf: &Btf) -> Result<MemoryFields, BtfError> {
    let Ok(memories) = btf.member("module.mem") else {
        let whole = btf.field("module.core_layout")?;
        let sizes = ["text_size", "ro_size", "ro_after_init_size"];
        let sizes = sizes.map(|name| btf.field(&format!("module.core_layout.{name}")));
        return Ok(MemoryFields::Layout {
            part: part(btf, "module_layout", whole.offset)?,
            sizes: sizes.into_iter().collect::<Result<_, _>>()?,
        });
    };
    let part = |kind: &str| {
        let index = btf.enum_value(kind)?.cast_unsigned();
        let offset = index.wrapping_mul(memories.element());
        part(btf, "module_memory", memories.offset.wrapping_add(offset))
    };
    Ok(MemoryFields::Memories {
        text: part("MOD_TEXT")?,
        rodata: part("MOD_RODATA")?,
        data: part("MOD_DATA")?,
    })
}

/// The fields of a range that is described by the structure `name` at `offset` of `struct module`.
fn part(btf: &Btf, name: &str, offset: u64) -> Result<PartFields, BtfError> {
    let inside = |path: &str| {
        let field = btf.field(&format!("{name}.{path}"))?;
        Ok::<_, BtfError>(Field {
            offset: offset.wrapping_add(field.offset),
            size: field.size,
        })
    };
    Ok(PartFields {
        base: inside("base")?,
        size: inside("size")?,
        owner: inside("mtn.mod")?,
        node: inside("mtn.node")?,
    })
}

fn tree(btf: &Btf, at: Gva) -> Result<TreeLayout, BtfError> {
    let inside = |path: &str| Ok::<_, BtfError>(btf.field(path)?.of(at));
    let container = match btf.has("module_memory") {
        true => "module_memory",
        false => "module_layout",
    };
    let range = part(btf, container, 0)?;
    let from_node =
        |field: Field| (field.offset.cast_signed()).wrapping_sub(range.node.offset.cast_signed());
    let roots = btf.member("mod_tree_root.root.tree")?;
    let first = at.add(roots.offset);
    let sequences = [
        "mod_tree_root.root.seq.seqcount.sequence",
        "mod_tree_root.root.seq.sequence",
    ];
    Ok(TreeLayout {
        seq: btf.first_field(&sequences)?.of(at),
        roots: [first, first.add(roots.element())].map(|root| {
            let pointer = btf.field("rb_root.rb_node");
            pointer.map_or(root, |pointer| pointer.of(root))
        }),
        addr_min: inside("mod_tree_root.addr_min")?,
        addr_max: inside("mod_tree_root.addr_max")?,
        base: from_node(range.base),
        size: (from_node(range.size), range.size),
        rb_node: RbNodeLayout {
            size: btf.size_of("rb_node")?,
            parent_color: btf.field("rb_node.__rb_parent_color")?,
            left: btf.field("rb_node.rb_left")?,
            right: btf.field("rb_node.rb_right")?,
        },
    })
}
