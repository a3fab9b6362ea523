//! Symbols for the frames of a stack, as `/proc/PID/stack` shows them.
//!
//! This module follows `kernel/kallsyms.c: sprint_backtrace`: a return address belongs to the call
//! before it. Code of patches, for which the guest has no symbols, gets those of the patch's
//! module.

use introspect::modules::{self, Module, ModuleSymbols};
use introspect::{Frame, Gva, Kernel, KernelMemory, Stack, Task, Unwinder};

use crate::module::Image;
use crate::report::stack::{NamedFrame, TaskStack};

/// The modules of a guest at one moment, with their symbols.
pub type LoadedModules = Vec<(Module, ModuleSymbols)>;

/// Reads the modules and their symbols for a [`Symbolizer`], as far as they can be read. Only while
/// paused.
#[must_use]
pub fn loaded(kernel: &Kernel, memory: &KernelMemory<'_>) -> LoadedModules {
    let modules = modules::list(kernel, memory)
        .unwrap_or_default()
        .into_iter();
    modules
        .map(|module| {
            let symbols = module.symbols(kernel, memory).unwrap_or_default();
            (module, symbols)
        })
        .collect()
}

/// Symbolizes code addresses of one guest. Does not read the guest: what it needs was read in a
/// pause, so the guest runs while frames are symbolized.
pub struct Symbolizer<'a> {
    kernel: &'a Kernel,
    unwinder: &'a Unwinder,
    images: Vec<&'a Image>,
    modules: LoadedModules,
}

impl<'a> Symbolizer<'a> {
    /// A symbolizer for stacks that were read in the same pause as `modules`. `images` are the
    /// patches in the guest.
    pub fn new(
        kernel: &'a Kernel,
        unwinder: &'a Unwinder,
        modules: LoadedModules,
        images: Vec<&'a Image>,
    ) -> Symbolizer<'a> {
        Symbolizer {
            kernel,
            unwinder,
            images,
            modules,
        }
    }

    /// The report of `task`'s stack, with the symbol of each frame.
    #[must_use]
    pub fn stack(&self, task: &Task, stack: &Stack) -> TaskStack {
        TaskStack {
            task: task.clone(),
            frames: stack.frames.iter().map(|frame| self.frame(frame)).collect(),
            verdict: stack.verdict.clone(),
        }
    }

    fn frame(&self, frame: &Frame) -> NamedFrame {
        let adjust = u64::from(!frame.exact);
        let code = frame.ip.sub(adjust);
        let named = self
            .in_patch(code)
            .or_else(|| self.in_module(code))
            .or_else(|| self.in_kernel(code));
        NamedFrame {
            ip: frame.ip,
            name: match named {
                Some((name, offset, size, "")) => {
                    format!("{name}+{:#x}/{size:#x}", offset + adjust)
                }
                Some((name, offset, size, owner)) => {
                    format!("{name}+{:#x}/{size:#x} [{owner}]", offset + adjust)
                }
                None => format!("{:#x}", frame.ip.0),
            },
            sched: self.unwinder.is_sched_text(frame.ip),
        }
    }

    fn in_patch(&self, code: Gva) -> Option<(&str, u64, u64, &str)> {
        self.images.iter().find_map(|image| {
            let symbol = image.symbol_at(code)?;
            let offset = code.since(symbol.address);
            Some((
                symbol.name.as_str(),
                offset,
                symbol.size,
                image.name.as_str(),
            ))
        })
    }

    fn in_module(&self, code: Gva) -> Option<(&str, u64, u64, &str)> {
        let (module, symbols) = (self.modules.iter()).find(|(module, _)| module.contains(code))?;
        let (symbol, offset) = symbols.at(code)?;
        let text = module.text.iter().find(|text| text.contains(code))?;
        let next = symbols.iter().map(|next| next.gva);
        let next = next.filter(|next| *next > symbol.gva).min();
        let end = next.unwrap_or(text.end).min(text.end);
        Some((symbol.name, offset, end.since(symbol.gva), &module.name))
    }

    fn in_kernel(&self, code: Gva) -> Option<(&str, u64, u64, &str)> {
        let (symbol, offset) = self.kernel.symbolize(code)?;
        Some((symbol.name, offset, self.kernel.symbols.size(code)?, ""))
    }
}
