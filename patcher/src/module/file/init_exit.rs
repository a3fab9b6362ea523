//! What the init and exit functions of a module do, read from their code.
//!
//! outpatch runs neither. So the init function may only pass its patch to `klp_enable_patch` and
//! return the result, and the exit function may do nothing; every other module is refused, because
//! the guest would lack what these functions do. Follows the instructions from the start of a
//! function: they must lead straight to its end. This module knows nothing of a guest.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, Register,
};
use object::elf;

use crate::module::error::ModuleError;
use crate::module::file::elf::{ElfFile, Place, Relocation, Section, Symbol};
use crate::module::file::klp::ModuleOffset;

/// The most bytes of a function that are read.
const MAX_FUNCTION: usize = 1 << 16;
/// Tables by which the kernel changes code when it loads a module, or later.
const CODE_TABLES: &[&str] = &["__jump_table", ".altinstructions", ".static_call_sites"];

/// The patch that the module's init function passes to `klp_enable_patch`, as far as it can be seen.
/// `refusals` gets [`ModuleError::Init`] when the function does anything else, or does not exist:
/// then the patch only serves to tell what else is refused.
pub(in crate::module) fn enabled_patch(
    file: &ElfFile,
    refusals: &mut Vec<ModuleError>,
) -> Option<ModuleOffset> {
    let mut refuse = |problem: &str| refusals.push(ModuleError::Init(problem.to_owned()));
    let Some(init) = function(file, "init_module") else {
        refuse("it has none, so that nothing enables the patch");
        return None;
    };
    let mut walk = match Walk::new(file, init, true) {
        Ok(walk) => walk,
        Err(problem) => {
            refuse(&problem);
            return None;
        }
    };
    walk.run();
    match (&walk.problem, walk.enabled) {
        (Some(problem), _) => refuse(problem),
        (None, Some(_)) => {}
        (None, None) => refuse("it does not call klp_enable_patch"),
    }
    walk.enabled
}

/// Checks that the module's exit function does nothing. A module without one is fine: it cannot be
/// unloaded.
///
/// # Errors
/// [`ModuleError::Exit`].
pub(in crate::module) fn check_exit(file: &ElfFile) -> Result<(), ModuleError> {
    let Some(exit) = function(file, "cleanup_module") else {
        return Ok(());
    };
    let mut walk = Walk::new(file, exit, false).map_err(ModuleError::Exit)?;
    walk.run();
    walk.problem.map_or(Ok(()), |it| Err(ModuleError::Exit(it)))
}

fn function<'a>(file: &'a ElfFile, name: &str) -> Option<&'a Symbol> {
    let mut symbols = file.symbols.iter();
    symbols.find(|s| s.name == name && matches!(s.place, Place::Section(_)))
}

/// The instructions of one function, from its start on. Errors say what the function does.
struct Walk<'a> {
    file: &'a ElfFile,
    section: &'a Section,
    code: &'a [u8],
    start: u64,
    name: String,
    /// Whether a call of `klp_enable_patch` is expected.
    enables: bool,
    /// What RDI holds, if that is an address in the module.
    argument: Option<ModuleOffset>,
    /// What was passed to `klp_enable_patch`.
    enabled: Option<ModuleOffset>,
    /// The first thing that it does and may not.
    problem: Option<String>,
}

impl<'a> Walk<'a> {
    fn new(file: &'a ElfFile, function: &'a Symbol, enables: bool) -> Result<Walk<'a>, String> {
        let Place::Section(index) = function.place else {
            return Err("it is not in the module".into());
        };
        let section = file.section(index).ok_or("its section does not exist")?;
        let end = function.value.saturating_add(function.size);
        let range = |from, to| {
            let bytes = usize::try_from(from).ok()?..usize::try_from(to).ok()?;
            file.data(section).get(bytes)
        };
        let code = range(function.value, end).ok_or("its code is not in the file")?;
        if code.len() > MAX_FUNCTION {
            return Err(format!("it has {} bytes", code.len()));
        }
        let changed = |table: &&str| {
            let table = file.find(table).map(|(_, table)| &table.relocations);
            table.into_iter().flatten().any(|r| {
                file.symbol(r.symbol).is_some_and(|s| {
                    let at = s.value.wrapping_add_signed(r.addend);
                    s.place == Place::Section(index) && (function.value..end).contains(&at)
                })
            })
        };
        if let Some(table) = CODE_TABLES.iter().find(|table| changed(table)) {
            return Err(format!(
                "its code is changed when the module is loaded ({table})"
            ));
        }
        Ok(Walk {
            file,
            section,
            code,
            start: function.value,
            name: function.name.clone(),
            enables,
            argument: None,
            enabled: None,
            problem: None,
        })
    }

    /// Follows the function to its first return. After something that it may not do, its code is
    /// read on from one instruction to the next, to see what it enables.
    fn run(&mut self) {
        let mut decoder = Decoder::with_ip(64, self.code, self.start, DecoderOptions::NONE);
        let mut registers = InstructionInfoFactory::new();
        let mut insn = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut insn);
            let done = match insn.flow_control() {
                FlowControl::Next => self.next(&insn, &mut registers),
                FlowControl::Call => self.call(&insn),
                FlowControl::UnconditionalBranch => {
                    let returns = self.target(&insn) == Some("__x86_return_thunk");
                    let done = if returns { Ok(()) } else { self.call(&insn) };
                    if done.is_ok() {
                        return;
                    }
                    done
                }
                FlowControl::Return => return,
                _ => Err(format!("it branches at {}", self.place(&insn))),
            };
            if let Err(problem) = done {
                self.problem.get_or_insert(problem);
            }
        }
        let endless = || "its code does not end with a return".into();
        self.problem.get_or_insert_with(endless);
    }

    /// An instruction that leads to the next: it may compute, but not store.
    fn next(
        &mut self,
        insn: &Instruction,
        registers: &mut InstructionInfoFactory,
    ) -> Result<(), String> {
        if insn.is_invalid() || insn.is_privileged() || insn.mnemonic() == Mnemonic::Syscall {
            return Err(format!(
                "it has a special instruction at {}",
                self.place(insn)
            ));
        }
        let info = registers.info(insn);
        let writes = |access: OpAccess| {
            matches!(
                access,
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            )
        };
        let own_stack = |base: Register| matches!(base, Register::RSP | Register::RBP);
        let stores = info
            .used_memory()
            .iter()
            .any(|memory| writes(memory.access()) && !own_stack(memory.base()));
        if stores && !insn.is_stack_instruction() {
            return Err(match self.relocation(insn) {
                Some(relocation) => format!("it stores to {}", self.describe(relocation, insn)),
                None => format!("it stores to memory at {}", self.place(insn)),
            });
        }
        let written = |register: Register| {
            info.used_registers()
                .iter()
                .any(|used| writes(used.access()) && used.register().full_register() == register)
        };
        if self.enabled.is_some() && written(Register::RAX) {
            return Err("it does not return the result of klp_enable_patch".into());
        }
        if written(Register::RDI) {
            let loads = matches!(
                insn.code(),
                Code::Mov_r64_imm64 | Code::Mov_rm64_imm32 | Code::Mov_r32_imm32 | Code::Lea_r64_m
            );
            let operand = self.relocation(insn).filter(|_| loads);
            self.argument = operand.and_then(|r| self.operand(r, insn.next_ip()));
        }
        Ok(())
    }

    fn call(&mut self, insn: &Instruction) -> Result<(), String> {
        match self.target(insn) {
            Some("__fentry__") if insn.flow_control() == FlowControl::Call => Ok(()),
            Some("klp_enable_patch") if self.enables && self.enabled.is_none() => {
                let argument = self.argument.take();
                self.enabled = Some(argument.ok_or("what it enables cannot be seen in its code")?);
                Ok(())
            }
            Some(name) => {
                // A function leaves nothing of its arguments in the registers.
                self.argument = None;
                Err(format!("it calls {name}"))
            }
            None => Err(format!("it branches at {}", self.place(insn))),
        }
    }

    /// The symbol that a direct call or jump leads to.
    fn target(&self, insn: &Instruction) -> Option<&'a str> {
        let relocation = self.relocation(insn)?;
        let near = insn.is_call_near() || insn.is_jmp_near();
        let symbol = self.file.symbol(relocation.symbol)?;
        near.then_some(symbol.name.as_str())
    }

    fn relocation(&self, insn: &Instruction) -> Option<&'a Relocation> {
        (insn.ip()..insn.next_ip()).find_map(|at| self.section.relocation_at(at))
    }

    /// What an instruction's relocated operand refers to. `next` is the end of the instruction,
    /// from which relative operands count.
    fn operand(&self, relocation: &Relocation, next: u64) -> Option<ModuleOffset> {
        let symbol = self.file.symbol(relocation.symbol)?;
        let Place::Section(section) = symbol.place else {
            return None;
        };
        let offset = symbol.value.wrapping_add_signed(relocation.addend);
        match elf::RelocationType(relocation.kind) {
            elf::R_X86_64_PC32 => Some(ModuleOffset {
                section,
                offset: offset.wrapping_add(next.wrapping_sub(relocation.offset)),
            }),
            elf::R_X86_64_64 | elf::R_X86_64_32 | elf::R_X86_64_32S => {
                Some(ModuleOffset { section, offset })
            }
            _ => None,
        }
    }

    /// What an instruction's relocated operand refers to, by the name of the object, or of the
    /// symbol or section that it is in.
    fn describe(&self, relocation: &Relocation, insn: &Instruction) -> String {
        let Some(at) = self.operand(relocation, insn.next_ip()) else {
            let symbol = self.file.symbol(relocation.symbol);
            return symbol.map_or_else(String::new, |s| s.name.clone());
        };
        let covers = |s: &&Symbol| {
            let inside = at.offset >= s.value && at.offset - s.value < s.size;
            s.object && s.place == Place::Section(at.section) && inside
        };
        let object = self.file.symbols.iter().find(covers).map(|s| &s.name);
        let section = self.file.section(at.section).map(|s| &s.name);
        object.or(section).cloned().unwrap_or_default()
    }

    fn place(&self, insn: &Instruction) -> String {
        format!("{}+{:#x}", self.name, insn.ip() - self.start)
    }
}
