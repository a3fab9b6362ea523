//! [`GuestTarget`]: a guest's kernel as the target of linking.

use std::cell::OnceCell;

use introspect::{Btf, BtfError, Gva, Kernel, KernelMemory};

use crate::module::error::TargetError;
use crate::module::file::klp::KlpLayout;
use crate::module::kernel::exports::Exports;
use crate::module::kernel::{
    AltInstrLayout, BugLayout, ExceptionLayout, Export, JumpEntryLayout, Layouts, ModversionLayout,
    TargetKernel,
};

/// What every livepatch's init function calls. The init function is not run, but its code may be
/// linked with the rest. If the kernel has no such export, a function that returns at once stands
/// in for it.
const KLP_ENABLE_PATCH: &str = "klp_enable_patch";
/// The most bytes of a vermagic string; real ones have some 60.
const MAX_VERMAGIC: usize = 256;
/// The most words of CPU capabilities; `NCAPINTS + NBUGINTS` is about 24.
const MAX_CAPABILITIES: u64 = 256;

/// A guest's kernel, read through introspection.
#[derive(Debug)]
pub struct GuestTarget<'a> {
    kernel: &'a Kernel,
    memory: &'a KernelMemory<'a>,
    exports: OnceCell<Exports<'a>>,
}

impl<'a> GuestTarget<'a> {
    /// The target `kernel`, which is read through `memory`.
    #[must_use]
    pub fn new(kernel: &'a Kernel, memory: &'a KernelMemory<'a>) -> GuestTarget<'a> {
        GuestTarget {
            kernel,
            memory,
            exports: OnceCell::new(),
        }
    }

    fn exports(&self) -> Result<&Exports<'a>, TargetError> {
        if let Some(known) = self.exports.get() {
            return Ok(known);
        }
        let found = Exports::find(&self.kernel.symbols, &self.kernel.btf, self.memory)?;
        Ok(self.exports.get_or_init(|| found))
    }

    fn address(&self, name: &'static str) -> Result<Gva, TargetError> {
        self.kernel
            .symbols
            .address(name)
            .map_err(|_| TargetError::NoSymbol(name))
    }

    /// The layout of the livepatch structures in modules for this kernel.
    ///
    /// # Errors
    /// [`TargetError::Types`] when the kernel's types lack something.
    pub fn klp_layout(&self) -> Result<KlpLayout, TargetError> {
        let btf = &self.kernel.btf;
        match btf.has("klp_patch") {
            true => klp(btf).map_err(TargetError::from),
            false => Ok(KlpLayout::PUBLIC),
        }
    }

    fn layouts_with(&self, klp: KlpLayout) -> Result<Layouts, BtfError> {
        let btf = &self.kernel.btf;
        let at = |path: &str| btf.field(path).map(|field| field.offset);
        Ok(Layouts {
            klp,
            module_size: btf.size_of("module")?,
            modversion: match btf.has("modversion_info") {
                false => None,
                true => Some(ModversionLayout {
                    size: btf.size_of("modversion_info")?,
                    crc: at("modversion_info.crc")?,
                    name: at("modversion_info.name")?,
                }),
            },
            alt_instr: AltInstrLayout {
                size: btf.size_of("alt_instr")?,
                instr_offset: at("alt_instr.instr_offset")?,
                repl_offset: at("alt_instr.repl_offset")?,
                cpuid: u16_offset(btf, "alt_instr.cpuid")?,
                flags: u16_offset(btf, "alt_instr.flags").ok(),
                instrlen: at("alt_instr.instrlen")?,
                replacementlen: at("alt_instr.replacementlen")?,
            },
            jump_entry: JumpEntryLayout {
                size: btf.size_of("jump_entry")?,
                code: at("jump_entry.code")?,
                target: at("jump_entry.target")?,
                key: at("jump_entry.key")?,
            },
            exception: ExceptionLayout {
                size: btf.size_of("exception_table_entry")?,
                insn: at("exception_table_entry.insn")?,
                fixup: at("exception_table_entry.fixup")?,
                handler: at("exception_table_entry.handler").ok(),
            },
            bug: match at("bug_entry.bug_addr_disp") {
                Err(_) => None,
                Ok(bug_addr_disp) => Some(BugLayout {
                    size: btf.size_of("bug_entry")?,
                    bug_addr_disp,
                    file_disp: at("bug_entry.file_disp").ok(),
                    format_disp: at("bug_entry.format_disp").ok(),
                }),
            },
            static_key_enabled: at("static_key.enabled")?,
        })
    }
}

fn klp(btf: &Btf) -> Result<KlpLayout, BtfError> {
    let at = |path: &str| btf.field(path).map(|field| field.offset);
    let callback = |path: &str, name| at(path).map(|offset| (offset, name));
    Ok(KlpLayout {
        patch_size: btf.size_of("klp_patch")?,
        patch_mod: at("klp_patch.mod")?,
        patch_objs: at("klp_patch.objs")?,
        patch_states: at("klp_patch.states").ok(),
        patch_replace: at("klp_patch.replace")?,
        object_size: btf.size_of("klp_object")?,
        object_name: at("klp_object.name")?,
        object_funcs: at("klp_object.funcs")?,
        object_callbacks: [
            callback("klp_object.callbacks.pre_patch", "pre_patch")?,
            callback("klp_object.callbacks.post_patch", "post_patch")?,
            callback("klp_object.callbacks.pre_unpatch", "pre_unpatch")?,
            callback("klp_object.callbacks.post_unpatch", "post_unpatch")?,
        ],
        func_size: btf.size_of("klp_func")?,
        func_old_name: at("klp_func.old_name")?,
        func_new_func: at("klp_func.new_func")?,
        func_old_sympos: at("klp_func.old_sympos")?,
    })
}

/// The offset of a 16-bit member that may be declared as a bit field.
fn u16_offset(btf: &Btf, path: &str) -> Result<u64, BtfError> {
    let member = btf.member(path)?;
    let shift = member.bits.map_or(0, |bits| bits.shift);
    Ok(member.offset + u64::from(shift / 8))
}

impl TargetKernel for GuestTarget<'_> {
    fn layouts(&self) -> Result<Layouts, TargetError> {
        self.layouts_with(self.klp_layout()?)
            .map_err(TargetError::from)
    }

    fn vermagic(&self) -> Result<String, TargetError> {
        let at = self.address("vermagic")?;
        let text = self.memory.cstr(at, MAX_VERMAGIC);
        text.map_err(|_| TargetError::Memory {
            what: "the kernel's vermagic",
            at,
        })
    }

    fn symbols(&self, name: &str) -> Vec<Gva> {
        self.kernel
            .symbols
            .all(name)
            .map(|symbol| symbol.gva)
            .collect()
    }

    fn name_of(&self, address: Gva) -> Option<String> {
        let (symbol, offset) = self.kernel.symbols.at(address)?;
        Some(match offset {
            0 => symbol.name.to_owned(),
            _ => format!("{}+{offset:#x}", symbol.name),
        })
    }

    fn export(&self, name: &str) -> Result<Option<Export>, TargetError> {
        match self.exports()?.get(name)? {
            None if name == KLP_ENABLE_PATCH && !self.kernel.btf.has("klp_patch") => {
                Ok(Some(Export {
                    address: self.address("ftrace_stub")?,
                    gpl_only: true,
                    namespace: None,
                    crc: None,
                }))
            }
            found => Ok(found),
        }
    }

    fn capabilities(&self) -> Result<Vec<u32>, TargetError> {
        let field = self.kernel.btf.field("cpuinfo_x86.x86_capability");
        let field = field.map_err(TargetError::from)?;
        let at = field.of(self.address("boot_cpu_data")?);
        let words = field.size / 4;
        if words == 0 || words > MAX_CAPABILITIES {
            return Err(TargetError::Invalid("number of CPU capabilities"));
        }
        (0..words)
            .map(|index| {
                let at = at.add(index * 4);
                self.memory.u32(at).map_err(|_| TargetError::Memory {
                    what: "the CPU's capabilities",
                    at,
                })
            })
            .collect()
    }

    fn is_up(&self) -> Result<bool, TargetError> {
        let at = self.address("system_state")?;
        let running = self.kernel.btf.enum_value("SYSTEM_RUNNING");
        let running = running.map_err(TargetError::from)?;
        let state = self.memory.u32(at).map_err(|_| TargetError::Memory {
            what: "the guest's system_state",
            at,
        })?;
        Ok(i64::from(state) >= running)
    }

    fn read(&self, what: &'static str, at: Gva, buf: &mut [u8]) -> Result<(), TargetError> {
        self.memory
            .read(at, buf)
            .map_err(|_| TargetError::Memory { what, at })
    }
}
