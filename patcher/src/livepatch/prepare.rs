//! Makes a patch of a parsed livepatch module: allocates its memory, links it for its addresses and
//! builds its stubs and its `struct module`, all while the guest runs.
//!
//! This is the counterpart of `kernel/livepatch/core.c: klp_init_patch`. This module writes nothing
//! that the guest can see; only [`fill_data`] writes at all, to memory that the guest does not map
//! yet.

use std::collections::HashSet;

use introspect::unwind::CodeRegion;
use introspect::unwind::OrcTable;
use introspect::unwind::Unwinder;
use introspect::{Gva, GvaRange, Kernel, KernelMemory};

use crate::error::PatchError;
use crate::ftrace::site::Site;
use crate::guest::Guest;
use crate::guest::kernel_info::KernelInfo;
use crate::livepatch::allocations::{Allocations, Allocator, state_source};
use crate::livepatch::func::{PatchedFunction, Target};
use crate::livepatch::func_stack;
use crate::livepatch::patch::{Patch, ReplacedPatch};
use crate::machine::Machine;
use crate::memory::write_batch::WriteBatch;
use crate::memory::{PatchMemory, Request, Usage};
use crate::module::{self, GuestTarget, Image, KlpPatch, LinkError, LivepatchModule, ModuleError};
use crate::registration::tables::{self, Tables};
use crate::registration::{Registration, module_struct};
use crate::report::patch::PatchPhase;
use crate::report::transition::TransitionSummary;
use crate::x86::INT3;
use crate::x86::entry_stub::{self, StateSource};

/// Allocates memory for `module` in the guest and links it, on top of the patches in `others`.
///
/// # Errors
/// [`PatchError`], with everything freed that was allocated.
pub fn prepare_patch<M: Machine>(
    machine: &mut M,
    guest: &mut Guest,
    patch_memory: &mut PatchMemory,
    module: &LivepatchModule,
    others: &[Patch],
) -> Result<Patch, PatchError> {
    let info = guest.info()?.clone();
    let kernel = &guest.kernel;
    let (klp, functions) = {
        let memory = kernel.memory(machine.memory());
        resolve(kernel, &memory, &info, module, others)?
    };
    let mut allocator = Allocator::new(machine, kernel, &info, patch_memory)?;
    let inputs = (module, &klp, others);
    let built = build(&mut allocator, &mut guest.unwinder, inputs, functions);
    if built.is_err() {
        allocator.free_all();
    }
    built
}

/// Reads the patch of `module` and finds its functions.
///
/// # Errors
/// [`PatchError`]: if the patch is refused, with every reason for it.
fn resolve(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    info: &KernelInfo,
    module: &LivepatchModule,
    others: &[Patch],
) -> Result<(KlpPatch, Vec<PatchedFunction>), PatchError> {
    let target = GuestTarget::new(kernel, memory);
    module::check_version(module, &target)?;
    let mut refusals = module.refusals().to_vec();
    let klp = module.patch(&target.klp_layout()?, &mut refusals);
    let klp = klp.unwrap_or_else(|error| {
        refusals.push(error);
        KlpPatch::default()
    });
    let mut reasons: Vec<PatchError> = refusals.into_iter().map(PatchError::from).collect();
    let functions = find_functions(kernel, memory, info, &klp, others, &mut reasons)?;
    if reasons.is_empty() {
        return Ok((klp, functions));
    }
    let told: HashSet<String> = reasons.iter().map(ToString::to_string).collect();
    let examined = module::examine(module, &klp, &target).into_iter();
    let examined = examined.map(PatchError::from);
    reasons.extend(examined.filter(|error| !told.contains(&error.to_string())));
    Err(PatchError::of_reasons(reasons))
}

/// Writes the data of `patch`, its constants and its tables to its hidden memory, which the guest
/// does not use yet.
///
/// # Errors
/// [`PatchError`].
pub fn fill_data<M: Machine>(
    machine: &mut M,
    patch_memory: &PatchMemory,
    patch: &Patch,
) -> Result<(), PatchError> {
    let mut writes = WriteBatch::new();
    let Patch { image, .. } = patch;
    patch_memory.plan_fill(patch.data, &image.data, &mut writes);
    patch_memory.plan_fill(patch.rodata, &image.rodata, &mut writes);
    patch_memory.plan_fill(patch.tables, &patch.tables_bytes, &mut writes);
    patch_memory.plan_part(patch.data, image.module, &patch.module_bytes, &mut writes);
    writes.commit(machine).map(drop)
}

/// Allocates the memory, links the module for it and builds what is made for the guest.
fn build<M: Machine>(
    allocator: &mut Allocator<'_, M>,
    unwinder: &mut Unwinder,
    (module, klp, others): (&LivepatchModule, &KlpPatch, &[Patch]),
    functions: Vec<PatchedFunction>,
) -> Result<Patch, PatchError> {
    let info = allocator.info;
    let allocations = Allocations::new(allocator, module.sizes(), functions.len() as u64)?;
    let image = {
        let memory = allocator.kernel.memory(allocator.machine.memory());
        let target = GuestTarget::new(allocator.kernel, &memory);
        module::link(module, klp, &target, allocations.load_addresses())
    };
    let image = image.map_err(|errors| {
        let reasons = errors.into_iter().map(PatchError::from);
        PatchError::of_reasons(reasons.collect())
    })?;
    let stubs = allocations.stubs();
    let tables = Tables::new(&image, stubs);
    let tables_request = Request {
        len: tables.len(),
        align: tables::ALIGN,
    };
    let tables_memory = allocator.allocate(Usage::RoData, tables_request)?;
    let tables = tables.place(tables_memory.range.start)?;
    let module_memory = allocations.module_memory();
    let fields = &info.registration.module;
    let module_bytes = module_struct::bytes(fields, &image, &module_memory, &tables)?;
    let source = allocations.source;
    let functions = set_targets(&image, functions, stubs.start, source);
    let replaces = match image.replace {
        true => others.iter().map(replaced).collect(),
        false => Vec::new(),
    };
    let code_bytes = code_bytes(&image, &functions, info, (source, allocations.stubs_at))?;
    let region = add_region(unwinder, &image)?;
    unwinder.add_transient(stubs);
    Ok(Patch {
        registration: Registration::new(&info.registration, image.module, &module_memory),
        image,
        functions,
        code: allocations.code,
        code_bytes,
        rodata: allocations.rodata,
        data: allocations.data,
        module_bytes,
        tables: tables_memory,
        tables_bytes: tables.bytes,
        table: allocations.table,
        stubs,
        stubs_changed: false,
        replaces,
        region,
        phase: PatchPhase::Applying,
        forced: false,
        last_transition: TransitionSummary::default(),
    })
}

/// The functions that `patch` replaces, each with its entry, followed by those whose calls it makes
/// reach the original again (`kernel/livepatch/core.c: klp_add_nops`). The addresses of the new
/// functions and of the stubs are not set yet. `reasons` gets an error for each function that cannot
/// be patched.
fn find_functions(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    info: &KernelInfo,
    patch: &KlpPatch,
    others: &[Patch],
    reasons: &mut Vec<PatchError>,
) -> Result<Vec<PatchedFunction>, PatchError> {
    let mut functions: Vec<PatchedFunction> = Vec::new();
    for function in &patch.functions {
        let name = (function.old_name.as_str(), function.sympos);
        let found = match find_function(kernel, memory, info, name, others) {
            Ok(found) => found,
            Err(error) if error.is_of_patch() => {
                reasons.push(error);
                continue;
            }
            Err(error) => return Err(error),
        };
        if functions.iter().any(|other| other.site.at == found.site.at) {
            reasons.push(ModuleError::Twice(found.name).into());
            continue;
        }
        functions.push(found);
    }
    if patch.replace {
        let rest = func_stack::all(others).into_iter();
        let rest = rest.filter(|old| functions.iter().all(|other| other.site.at != old.site.at));
        let restored: Vec<PatchedFunction> = rest
            .map(|old| PatchedFunction {
                new: Target::Original,
                previous: old.new,
                previous_code: func_stack::previous(
                    others,
                    old.original.first().unwrap_or(&GvaRange::default()),
                )
                .1,
                superseded_by: None,
                ..old.clone()
            })
            .collect();
        functions.extend(restored);
    }
    Ok(functions)
}

/// The function `name` with this `sympos`, and the function that its calls reach now.
fn find_function(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    info: &KernelInfo,
    (name, sympos): (&str, u64),
    others: &[Patch],
) -> Result<PatchedFunction, PatchError> {
    let found = module::resolve_function(&kernel.symbols, name, sympos)?;
    let site = match func_stack::newest(others, &found.range) {
        // A patch of ours has the entry already; the first pause checks that it still does.
        Some((_, newest)) => newest.site,
        None => free_site(kernel, memory, info, name, found.range.start)?,
    };
    let (previous, previous_code) = func_stack::previous(others, &found.range);
    Ok(PatchedFunction {
        name: name.into(),
        sympos,
        original: found.ranges().collect(),
        new: Target::Original,
        previous,
        previous_code,
        superseded_by: None,
        site,
        stub: Gva::NULL,
    })
}

/// The entry of a function that no patch of ours has; an error if anything else uses it.
fn free_site(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    info: &KernelInfo,
    name: &str,
    entry: Gva,
) -> Result<Site, PatchError> {
    let name_of = |at| match kernel.symbolize(at) {
        Some((symbol, 0)) => symbol.name.to_string(),
        Some((symbol, offset)) => format!("{}+{offset:#x}", symbol.name),
        None => at.to_string(),
    };
    let site = Site::find(memory, &info.ftrace, info.ftrace_pages, entry, name_of);
    site.map_err(|source| PatchError::Site {
        function: name.into(),
        at: entry,
        source,
    })
}

/// Sets the stub of each function, and the new function of those that the module replaces.
fn set_targets(
    image: &Image,
    mut functions: Vec<PatchedFunction>,
    stubs: Gva,
    source: StateSource,
) -> Vec<PatchedFunction> {
    for (function, linked) in functions.iter_mut().zip(&image.functions) {
        function.new = Target::Patched(linked.new);
    }
    for (function, at) in functions.iter_mut().zip(0u64..) {
        function.stub = stubs.add(at * source.max_stub_len());
    }
    functions
}

fn replaced(other: &Patch) -> ReplacedPatch {
    ReplacedPatch {
        name: other.name().into(),
        code: other.code,
        registration: other.registration.clone(),
        text: other.image.code.clone(),
        stays: other.keeps_code(),
    }
}

/// The code of the image, followed by the stubs, padded with INT3.
fn code_bytes(
    image: &Image,
    functions: &[PatchedFunction],
    info: &KernelInfo,
    (source, stubs_at): (StateSource, u64),
) -> Result<Vec<u8>, PatchError> {
    let filler = INT3;
    let mut bytes = image.code.clone();
    bytes.resize(usize::try_from(stubs_at).unwrap_or_default(), filler);
    for function in functions {
        let previous = function.address_of(function.previous);
        let new = function.address_of(function.new);
        let mut stub = entry_stub::stub(function.stub, info.current, source, previous, new)?;
        stub.resize(
            usize::try_from(source.max_stub_len()).unwrap_or_default(),
            filler,
        );
        bytes.append(&mut stub);
    }
    Ok(bytes)
}

/// Rebuilds the stubs of `patch` so that they lead to the previous functions of now.
///
/// # Errors
/// [`PatchError`].
pub fn update_stubs(patch: &mut Patch, info: &KernelInfo) -> Result<(), PatchError> {
    let stubs_at = patch.stubs.start.since(patch.code.range.start);
    let source = state_source(info, patch.table)?;
    let bytes = code_bytes(&patch.image, &patch.functions, info, (source, stubs_at))?;
    patch.stubs_changed |= bytes != patch.code_bytes;
    patch.code_bytes = bytes;
    Ok(())
}

/// Gives the unwinder the ORC entries of the image, if it has any.
fn add_region(
    unwinder: &mut Unwinder,
    image: &Image,
) -> Result<Option<introspect::unwind::RegionId>, PatchError> {
    if image.orc.is_empty() {
        return Ok(None);
    }
    let entries = image.orc.iter().map(|record| (record.ip, record.entry));
    let orc =
        OrcTable::from_unsorted(entries.collect(), unwinder.encoding()).map_err(LinkError::from)?;
    let region = CodeRegion {
        name: image.name.clone(),
        text: image.text,
        orc,
        fingerprint: Vec::new(),
    };
    let id = unwinder.add_region(region).map_err(LinkError::from)?;
    Ok(Some(id))
}
