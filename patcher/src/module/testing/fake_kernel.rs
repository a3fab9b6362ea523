//! [`FakeKernel`]: a kernel to link for, whose answers are set in tables.
//!
//! The layouts are invented: no test may depend on those of a real kernel.

use std::collections::BTreeMap;

use introspect::Gva;

use crate::module::file::klp::KlpLayout;
use crate::module::kernel::{
    AltInstrLayout, BugLayout, ExceptionLayout, Export, JumpEntryLayout, Layouts, ModversionLayout,
    TargetKernel,
};
use crate::module::{LoadAddresses, TargetError};

/// The addresses that the tests link modules for.
pub const LOAD_AT: LoadAddresses = LoadAddresses {
    code: Gva(0xffff_ffff_8100_0000),
    rodata: Gva(0xffff_ffff_c200_0000),
    data: Gva(0xffff_ffff_c100_0000),
};
/// The address of the kernel.
pub const KERNEL: u64 = 0xffff_ffff_8000_0000;

pub fn layouts() -> Layouts {
    Layouts {
        klp: KlpLayout {
            patch_size: 48,
            patch_mod: 0,
            patch_objs: 8,
            patch_states: Some(16),
            patch_replace: 24,
            object_size: 64,
            object_name: 0,
            object_funcs: 8,
            object_callbacks: [
                (16, "pre_patch"),
                (24, "post_patch"),
                (32, "pre_unpatch"),
                (40, "post_unpatch"),
            ],
            func_size: 32,
            func_old_name: 0,
            func_new_func: 8,
            func_old_sympos: 16,
        },
        module_size: 24,
        modversion: Some(ModversionLayout {
            size: 64,
            crc: 0,
            name: 8,
        }),
        alt_instr: AltInstrLayout {
            size: 14,
            instr_offset: 0,
            repl_offset: 4,
            cpuid: 8,
            flags: Some(10),
            instrlen: 12,
            replacementlen: 13,
        },
        jump_entry: JumpEntryLayout {
            size: 16,
            code: 0,
            target: 4,
            key: 8,
        },
        exception: ExceptionLayout {
            size: 12,
            insn: 0,
            fixup: 4,
            handler: None,
        },
        bug: Some(BugLayout {
            size: 16,
            bug_addr_disp: 0,
            file_disp: Some(8),
            format_disp: Some(4),
        }),
        static_key_enabled: 0,
    }
}

/// A kernel in tables.
#[derive(Clone, Debug)]
pub struct FakeKernel {
    pub layouts: Layouts,
    pub vermagic: String,
    pub symbols: BTreeMap<String, Vec<u64>>,
    pub exports: BTreeMap<String, Export>,
    pub capabilities: Vec<u32>,
    pub up: bool,
    pub memory: BTreeMap<u64, Vec<u8>>,
}

impl FakeKernel {
    pub fn new() -> FakeKernel {
        let mut kernel = FakeKernel {
            layouts: layouts(),
            vermagic: "9.9-test SMP modversions ".into(),
            symbols: BTreeMap::new(),
            exports: BTreeMap::new(),
            capabilities: vec![1 << 3, 0],
            up: true,
            memory: BTreeMap::new(),
        };
        for (name, offset) in [
            ("__fentry__", 0x100),
            ("klp_enable_patch", 0x200),
            ("puts", 0x300),
            ("__x86_return_thunk", 0x400),
            ("module_layout", 0x500),
        ] {
            kernel.add_export(name, KERNEL + offset);
        }
        for (name, offset) in [
            ("__x86_return_thunk", 0x400),
            ("x86_return_thunk", 0x8000),
            ("nop_func", 0x600),
            ("__start_ro_after_init", 0x9000),
            ("__end_ro_after_init", 0xa000),
        ] {
            kernel.symbols.insert(name.into(), vec![KERNEL + offset]);
        }
        kernel.set_memory(0x8000, &(KERNEL + 0x480).to_le_bytes());
        kernel
    }

    pub fn add_export(&mut self, name: &str, address: u64) {
        let export = Export {
            address: Gva(address),
            gpl_only: false,
            namespace: None,
            crc: Some(crc(name)),
        };
        self.exports.insert(name.into(), export);
    }

    /// Sets the bytes at an offset from [`KERNEL`].
    pub fn set_memory(&mut self, offset: u64, bytes: &[u8]) {
        self.memory.insert(KERNEL + offset, bytes.to_vec());
    }
}

impl TargetKernel for FakeKernel {
    fn layouts(&self) -> Result<Layouts, TargetError> {
        Ok(self.layouts.clone())
    }

    fn vermagic(&self) -> Result<String, TargetError> {
        Ok(self.vermagic.clone())
    }

    fn symbols(&self, name: &str) -> Vec<Gva> {
        let found = self.symbols.get(name).cloned().unwrap_or_default();
        found.into_iter().map(Gva).collect()
    }

    fn name_of(&self, address: Gva) -> Option<String> {
        let named = self
            .symbols
            .iter()
            .find(|(_, all)| all.contains(&address.0));
        named.map(|(name, _)| name.clone())
    }

    fn export(&self, name: &str) -> Result<Option<Export>, TargetError> {
        Ok(self.exports.get(name).cloned())
    }

    fn capabilities(&self) -> Result<Vec<u32>, TargetError> {
        Ok(self.capabilities.clone())
    }

    fn is_up(&self) -> Result<bool, TargetError> {
        Ok(self.up)
    }

    fn read(&self, what: &'static str, at: Gva, buf: &mut [u8]) -> Result<(), TargetError> {
        match self.memory.get(&at.0) {
            Some(bytes) if bytes.len() == buf.len() => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            _ => Err(TargetError::Memory { what, at }),
        }
    }
}

/// The version of the symbol `name`.
pub fn crc(name: &str) -> u32 {
    name.bytes().fold(7, |sum: u32, byte| {
        sum.wrapping_mul(31).wrapping_add(byte.into())
    })
}
