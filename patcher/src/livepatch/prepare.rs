//! From a module's file to a patch that is ready for its first pause: everything that can be done while the guest runs.
//!
//! Nothing that the guest can see is written here, and nothing at all but by [`fill`].

use introspect::unwind::Unwinder;
use introspect::unwind::code_map::CodeRegion;
use introspect::unwind::orc_table::OrcTable;
use introspect::{Gva, GvaRange, Kernel, KernelMemory};

use crate::error::PatchError;
use crate::error::unexpected;
use crate::ftrace::site::Site;
use crate::guest::Guest;
use crate::guest::kernel_info::KernelInfo;
use crate::livepatch::func::{PatchedFunction, Target};
use crate::livepatch::func_stack::{self};
use crate::livepatch::patch::{Patch, Replaced};
use crate::machine::Machine;
use crate::memory::write_batch::WriteBatch;
use crate::memory::{Allocation, PatchMemory, Request};
use crate::module::KlpPatch;
use crate::module::{
    self, GuestTarget, Image, LinkError, LivepatchModule, LoadAddresses, ModuleError, Sizes,
};
use crate::report::patch::PatchPhase;
use crate::report::transition::TransitionSummary;
use crate::transition::pending_tasks;
use crate::x86::INT3;
use crate::x86::entry_stub::{self, StateSource};

/// Stubs begin at a multiple of this.
const STUB_ALIGN: u64 = 16;

/// Places and links `module` for the guest; with `others` in it already.
///
/// # Errors
/// [`PatchError`] with every piece given back.
pub fn prepare<M: Machine>(
    machine: &mut M,
    guest: &mut Guest,
    patch_memory: &mut PatchMemory,
    module: &LivepatchModule,
    others: &[Patch],
) -> Result<Patch, PatchError> {
    let info = guest.info()?.clone();
    let kernel = &guest.kernel;
    let (klp, olds) = {
        let memory = kernel.memory(machine.memory());
        let klp = module.patch(&GuestTarget::new(kernel, &memory).klp_layout()?)?;
        let olds = old_functions(kernel, &memory, &info, &klp, others)?;
        (klp, olds)
    };
    let mut taken = Vec::new();
    let functions = olds.len() as u64;
    let pieces = take_pieces(
        machine,
        (kernel, &info),
        patch_memory,
        (module.sizes(), functions),
        &mut taken,
    );
    let built = pieces
        .and_then(|pieces| build(machine, guest, &info, (module, &klp, others), olds, &pieces));
    if built.is_err() {
        taken.into_iter().for_each(|piece| patch_memory.free(piece));
    }
    built
}

/// Takes room for a module of these sizes with so many functions; `taken` is all that was taken, also when that fails half way.
fn take_pieces<M: Machine>(
    machine: &mut M,
    (kernel, info): (&Kernel, &KernelInfo),
    patch_memory: &mut PatchMemory,
    (sizes, functions): (Sizes, u64),
    taken: &mut Vec<Allocation>,
) -> Result<Pieces, PatchError> {
    let mut take_data = |machine: &mut M, patch_memory: &mut PatchMemory, need| {
        let piece = patch_memory.allocate_data(machine, kernel, &info.areas, need)?;
        taken.push(piece);
        Ok::<_, PatchError>(piece)
    };
    let table = match info.klp {
        Some(_) => None,
        None => {
            let tasks = kernel.symbols.address("nr_threads")?;
            let tasks = kernel.memory(machine.memory()).u32(tasks)?;
            Some(take_data(
                machine,
                patch_memory,
                pending_tasks::table_request(tasks.into()),
            )?)
        }
    };
    let data_need = Request {
        len: sizes.data,
        align: sizes.data_align,
    };
    let data = match sizes.data {
        0 => None,
        _ => Some(take_data(machine, patch_memory, data_need)?),
    };
    let ask = ask(info, table)?;
    let stubs_at = sizes.code.next_multiple_of(STUB_ALIGN);
    let stubs_len = ask.max_stub_len() * functions;
    let need = Request {
        len: stubs_at.saturating_add(stubs_len),
        align: sizes.code_align.max(STUB_ALIGN),
    };
    let code = patch_memory.allocate_code(machine, kernel, &info.areas, need)?;
    taken.push(code);
    Ok(Pieces {
        code,
        data,
        table,
        ask,
        stubs_at,
        stubs_len,
    })
}

/// How the stubs of a patch with this table, if it has one, learn who has moved.
fn ask(info: &KernelInfo, table: Option<Allocation>) -> Result<StateSource, PatchError> {
    if let Some(table) = table {
        return Ok(StateSource::PendingTasks(pending_tasks::table_in(table)));
    }
    let offset = info.klp.as_ref().map(|klp| klp.patch_state.offset);
    let offset = offset.and_then(|offset| u32::try_from(offset).ok());
    offset
        .map(StateSource::PatchState)
        .ok_or_else(|| unexpected("task_struct.patch_state is out of reach"))
}

/// Puts the data of `patch` into its hidden memory, which the guest does not see yet.
///
/// # Errors
/// [`PatchError`].
pub fn fill<M: Machine>(
    machine: &mut M,
    kernel: &Kernel,
    patch_memory: &PatchMemory,
    patch: &Patch,
) -> Result<(), PatchError> {
    let Some(data) = patch.data else {
        return Ok(());
    };
    let mut plan = WriteBatch::new();
    let memory = kernel.memory(machine.memory());
    patch_memory.plan_fill(&memory, data, &patch.image.data, &mut plan)?;
    plan.commit(machine).map(drop)
}

/// Where the patch goes.
struct Pieces {
    code: Allocation,
    data: Option<Allocation>,
    table: Option<Allocation>,
    ask: StateSource,
    stubs_at: u64,
    stubs_len: u64,
}

fn build<M: Machine>(
    machine: &M,
    guest: &mut Guest,
    info: &KernelInfo,
    (module, klp, others): (&LivepatchModule, &KlpPatch, &[Patch]),
    olds: Vec<PatchedFunction>,
    pieces: &Pieces,
) -> Result<Patch, PatchError> {
    let code_base = pieces.code.range.start;
    let bases = LoadAddresses {
        code: code_base,
        data: pieces.data.map_or(code_base, |data| data.range.start),
    };
    let image = {
        let memory = guest.kernel.memory(machine.memory());
        module::link(
            module,
            klp,
            &GuestTarget::new(&guest.kernel, &memory),
            bases,
        )?
    };
    let stubs_start = code_base.add(pieces.stubs_at);
    let stubs = GvaRange::new(stubs_start, stubs_start.add(pieces.stubs_len));
    let functions = functions(&image, olds, stubs.start, pieces.ask);
    let replaces = match image.replace {
        true => others.iter().map(replaced).collect(),
        false => Vec::new(),
    };
    let code_bytes = code_bytes(&image, &functions, info, (pieces.ask, pieces.stubs_at))?;
    let region = add_region(&mut guest.unwinder, &image)?;
    guest.unwinder.add_transient(stubs);
    Ok(Patch {
        image,
        functions,
        code: pieces.code,
        code_bytes,
        data: pieces.data,
        table: pieces.table,
        stubs,
        stubs_changed: false,
        replaces,
        region,
        phase: PatchPhase::Applying,
        forced: false,
        past: TransitionSummary::default(),
    })
}

/// The functions that `patch` replaces, each with its entry, and behind them those that its coming makes the kernel's own again;
/// the addresses of new functions and stubs are yet to come.
fn old_functions(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    info: &KernelInfo,
    patch: &KlpPatch,
    others: &[Patch],
) -> Result<Vec<PatchedFunction>, PatchError> {
    let mut olds: Vec<PatchedFunction> = Vec::new();
    for function in &patch.functions {
        let name = (function.old_name.as_str(), function.sympos);
        let old = old_function(kernel, memory, info, name, others)?;
        if olds.iter().any(|other| other.site.at == old.site.at) {
            return Err(ModuleError::Twice(old.name).into());
        }
        olds.push(old);
    }
    if patch.replace {
        let left = func_stack::all(others).into_iter();
        let left = left.filter(|old| olds.iter().all(|other| other.site.at != old.site.at));
        let original_again: Vec<PatchedFunction> = left
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
        olds.extend(original_again);
    }
    Ok(olds)
}

/// The function `name` of this `sympos`, as it is now.
fn old_function(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    info: &KernelInfo,
    (name, sympos): (&str, u64),
    others: &[Patch],
) -> Result<PatchedFunction, PatchError> {
    let found = module::resolve_function(&kernel.symbols, name, sympos)?;
    let site = match func_stack::newest(others, &found.range) {
        // What stands there is ours, and the pause makes sure that it still does.
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

/// Gives the old functions their stubs, and those that the module replaces their new ones.
fn functions(
    image: &Image,
    mut olds: Vec<PatchedFunction>,
    stubs: Gva,
    ask: StateSource,
) -> Vec<PatchedFunction> {
    for (old, new) in olds.iter_mut().zip(&image.functions) {
        old.new = Target::Patched(new.new);
    }
    for (old, at) in olds.iter_mut().zip(0u64..) {
        old.stub = stubs.add(at * ask.max_stub_len());
    }
    olds
}

fn replaced(other: &Patch) -> Replaced {
    Replaced {
        name: other.name().into(),
        code: other.code,
        stays: other.forced,
    }
}

/// The image's code with the stubs behind it, filled up with INT3.
fn code_bytes(
    image: &Image,
    functions: &[PatchedFunction],
    info: &KernelInfo,
    (ask, stubs_at): (StateSource, u64),
) -> Result<Vec<u8>, PatchError> {
    let filler = INT3;
    let mut bytes = image.code.clone();
    bytes.resize(usize::try_from(stubs_at).unwrap_or_default(), filler);
    for function in functions {
        let (old, new) = (
            function.code_of(function.previous),
            function.code_of(function.new),
        );
        let mut stub = entry_stub::stub(function.stub, info.current, ask, old, new)?;
        stub.resize(
            usize::try_from(ask.max_stub_len()).unwrap_or_default(),
            filler,
        );
        bytes.append(&mut stub);
    }
    Ok(bytes)
}

/// Makes the stubs of `patch` lead to what is below it now.
///
/// # Errors
/// [`PatchError`].
pub fn update_stubs(patch: &mut Patch, info: &KernelInfo) -> Result<(), PatchError> {
    let stubs_at = patch.stubs.start.since(patch.code.range.start);
    let ask = ask(info, patch.table)?;
    let bytes = code_bytes(&patch.image, &patch.functions, info, (ask, stubs_at))?;
    patch.stubs_changed |= bytes != patch.code_bytes;
    patch.code_bytes = bytes;
    Ok(())
}

fn add_region(
    unwinder: &mut Unwinder,
    image: &Image,
) -> Result<Option<introspect::unwind::code_map::RegionId>, PatchError> {
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
        proof: Vec::new(),
    };
    let id = unwinder.add_region(region).map_err(LinkError::from)?;
    Ok(Some(id))
}
