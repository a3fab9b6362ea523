//! The [`Placement`] of each section of a livepatch module: code, read-only data, data, dropped.
//! Other sections are refused.
//!
//! This module follows what `kernel/module/main.c` and `arch/x86/kernel/module.c: module_finalize`
//! do with each. What this loader cannot do is refused by name: a guest in which a table was
//! silently dropped would misbehave later.

use crate::module::error::ModuleError;
use crate::module::file::elf::{ElfFile, Section};
use crate::module::file::names::Names;

/// Where a section goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::module) enum Placement {
    /// Executable, into the code region.
    Text,
    /// Read-only, into the region of constants.
    RoData,
    /// Writable, into the data region.
    Data,
    /// Not placed in the guest: init and exit code, information for the loader, tables that need no
    /// action.
    Dropped,
    /// Not supported, so that the module is refused.
    Refused,
}

/// Sections that may hold functions.
const TEXT: &[&str] = &[
    ".text",
    ".altinstr_replacement",
    ".altinstr_aux",
    ".fixup",
    ".noinstr.text",
    ".spinlock.text",
    ".sched.text",
    ".cpuidle.text",
    ".kprobes.text",
    ".irqentry.text",
    ".softirqentry.text",
    ".ref.text",
];

/// Sections that this loader reads itself, or that do not matter to code that is linked from
/// outside.
const DROPPED: &[&str] = &[
    // Never run: the patcher does what the init function would make the kernel do.
    ".init.text",
    ".init.data",
    ".init.rodata",
    ".exit.text",
    ".exit.data",
    // Information.
    ".modinfo",
    "__param",
    "__versions",
    "__version_ext_crcs",
    "__version_ext_names",
    ".orc_header",
    ".orc_unwind",
    ".orc_unwind_ip",
    ".printk_index",
    "_kprobe_blacklist",
    // Read when linking.
    ".altinstructions",
    ".return_sites",
    "__jump_table",
    "__mcount_loc",
    // Correct without action: the sites go through thunks and trampolines that the kernel
    // maintains, or only gain speed on one CPU.
    ".retpoline_sites",
    ".static_call_sites",
    ".call_sites",
    ".parainstructions",
    ".smp_locks",
    ".ibt_endbr_seal",
    "__patchable_function_entries",
];

/// `struct module` of the module itself.
pub(in crate::module) const THIS_MODULE: &str = ".gnu.linkonce.this_module";
/// The exception table: the guest sorts and reads it.
pub(in crate::module) const EX_TABLE: &str = "__ex_table";
/// The table of WARN and BUG: the guest notes in it which warnings it has given.
pub(in crate::module) const BUG_TABLE: &str = "__bug_table";
/// Static keys and other data that is constant once a module is loaded.
pub(in crate::module) const RO_AFTER_INIT: &str = ".data..ro_after_init";

/// Sections whose contents would have to be registered with the guest's kernel, each with the
/// reason for the message.
const REFUSED: &[(&str, &str)] = &[
    (".data..percpu", "per-CPU variables of its own"),
    (".ctors", "constructors"),
    (".init_array", "constructors"),
    ("__tracepoints", "tracepoints of its own"),
    ("__tracepoints_ptrs", "tracepoints of its own"),
    ("__tracepoints_strings", "tracepoints of its own"),
    ("__bpf_raw_tp_map", "tracepoints of its own"),
    ("_ftrace_events", "trace events of its own"),
    ("_ftrace_eval_map", "trace events of its own"),
    ("__tracepoint_str", "trace strings of its own"),
    ("__trace_printk_fmt", "trace_printk"),
    ("___srcu_struct_ptrs", "SRCU domains of its own"),
    (".kunit_test_suites", "KUnit tests"),
    (".kunit_init_test_suites", "KUnit tests"),
    ("__dyndbg", "dynamic debug (pr_debug)"),
    ("__dyndbg_classes", "dynamic debug (pr_debug)"),
    (".static_call.text", "static calls of its own"),
    ("__ksymtab", "exported symbols"),
    ("__ksymtab_gpl", "exported symbols"),
    ("__ksymtab_strings", "exported symbols"),
    ("__kcrctab", "exported symbols"),
    ("__kcrctab_gpl", "exported symbols"),
    ("__kflagstab", "exported symbols"),
];

/// The placement of one section, or why it is refused.
pub(in crate::module) fn placement(section: &Section) -> Result<Placement, &'static str> {
    let name = section.name.as_str();
    if !section.is_alloc() || section.size == 0 || section.is_relocations {
        return Ok(Placement::Dropped);
    }
    let refused = |(prefix, _): &&(&str, &str)| *prefix == name || within(name, prefix);
    if let Some((_, why)) = REFUSED.iter().find(refused) {
        return Err(why);
    }
    if DROPPED.contains(&name) || name.starts_with(".note") || name.starts_with(".discard") {
        return Ok(Placement::Dropped);
    }
    match (name, section.is_exec(), section.is_write()) {
        (THIS_MODULE | BUG_TABLE, false, true) => return Ok(Placement::Data),
        // No init function runs that could still write it.
        (EX_TABLE, false, _) | (RO_AFTER_INIT, false, true) => return Ok(Placement::RoData),
        _ => {}
    }
    let text = TEXT.contains(&name) || name.starts_with(".text.");
    let data = [".data", ".bss", ".rodata"]
        .iter()
        .any(|prefix| within(name, prefix));
    match (section.is_exec(), section.is_write()) {
        (true, false) if text => Ok(Placement::Text),
        (false, true) if data => Ok(Placement::Data),
        (false, false) if data => Ok(Placement::RoData),
        _ => Err("outpatch does not know what the kernel does with it"),
    }
}

/// Whether `name` is `prefix` or a subsection of it (`.data..ro_after_init` of `.data`).
fn within(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The placement of each section, by index. `refusals` gets an error for each section that is not
/// supported, and one for the format of a tool that is not read.
pub(in crate::module) fn placements(
    file: &ElfFile,
    names: &Names<'_>,
    refusals: &mut Vec<ModuleError>,
) -> Vec<Placement> {
    let format = format_of(file);
    refusals.extend(format.map(ModuleError::Format));
    let sections = file.sections.iter().enumerate();
    let place = |(index, section): (usize, &Section)| {
        let why = match placement(section) {
            Ok(placement) => return placement,
            Err(why) => why,
        };
        let of_format = FORMATS
            .iter()
            .any(|(_, prefix)| section.name.starts_with(prefix));
        if format.is_none() || !of_format {
            refusals.push(ModuleError::Section {
                section: section.name.clone(),
                functions: names.users(index, section),
                why,
            });
        }
        Placement::Refused
    };
    sections.map(place).collect()
}

/// The formats of other tools, and how the names of their own sections begin.
const FORMATS: &[(&str, &str)] = &[("kpatch-build", ".kpatch."), ("klp-build", ".init.klp_")];

/// The tool whose format the file has, if it is one that is not read.
fn format_of(file: &ElfFile) -> Option<&'static str> {
    let mut formats = FORMATS.iter();
    let has = |prefix: &str| file.sections.iter().any(|s| s.name.starts_with(prefix));
    formats
        .find(|(_, prefix)| has(prefix))
        .map(|(tool, _)| *tool)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(name: &str, flags: u64, size: u64) -> Section {
        Section::zeroed(name, flags, size)
    }

    const A: u64 = 2;
    const WA: u64 = 3;
    const AX: u64 = 6;

    #[test]
    fn known_sections_have_their_placement() {
        for (name, flags, want) in [
            (".text", AX, Placement::Text),
            (".text.unlikely", AX, Placement::Text),
            (".altinstr_aux", AX, Placement::Text),
            (".rodata.str1.1", A, Placement::RoData),
            (".data", WA, Placement::Data),
            (".data..ro_after_init", WA, Placement::RoData),
            ("__ex_table", A, Placement::RoData),
            ("__bug_table", WA, Placement::Data),
            (".gnu.linkonce.this_module", WA, Placement::Data),
            (".data.once", WA, Placement::Data),
            (".bss", WA, Placement::Data),
            (".init.text", AX, Placement::Dropped),
            (".note.gnu.property", A, Placement::Dropped),
            (".debug_info", 0, Placement::Dropped),
        ] {
            assert_eq!(placement(&section(name, flags, 8)), Ok(want), "{name}");
        }
    }

    #[test]
    fn sections_that_need_registration_are_refused() {
        for name in [".data..percpu", "__dyndbg", "__tracepoints"] {
            assert!(placement(&section(name, WA, 8)).is_err(), "{name}");
            assert_eq!(
                placement(&section(name, WA, 0)),
                Ok(Placement::Dropped),
                "empty {name}"
            );
        }
    }

    #[test]
    fn unknown_sections_are_refused() {
        for (name, flags) in [
            ("__brand_new_table", A),
            (".exec_me", AX),
            (".textual", AX),
            (".database", WA),
            // Writable code, and code in a data section.
            (".text", AX | 1),
            (".data", AX),
            ("__bug_table", A),
            ("__ex_table", AX),
        ] {
            assert!(
                placement(&section(name, flags, 8)).is_err(),
                "{name} {flags}"
            );
        }
    }
}
