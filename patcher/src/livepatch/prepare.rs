//! From a module's file to a patch that is ready for its first pause: everything that can be done while the guest runs.
//!
//! Nothing that the guest can see is written here, and nothing at all but by [`fill`].

use introspect::unwind::CodeRegion;
use introspect::unwind::OrcTable;
use introspect::unwind::Unwinder;
use introspect::{Gva, GvaRange, Kernel, KernelMemory};

use crate::error::PatchError;
use crate::ftrace::site::Site;
use crate::guest::Guest;
use crate::guest::kernel_info::KernelInfo;
use crate::livepatch::func_stack::{self, PatchedFunction, Target};
use crate::livepatch::patch::{Patch, Replaced};
use crate::machine::Machine;
use crate::memory::write_batch::WriteBatch;
use crate::memory::{Allocation, PatchMemory, Request};
use crate::module::{
    self, Bases, GuestTarget, Image, LinkError, LivepatchModule, ModuleError, Sizes, TargetError,
};
use crate::report::patch::PatchPhase;
use crate::transition::TransitionSummary;
use crate::transition::pending_tasks::PendingTable;
use crate::x86::entry_stub::{self, StateSource};

/// Stubs begin at a multiple of this.
const STUB_ALIGN: u64 = 16;

impl From<ModuleError> for PatchError {
    fn from(error: ModuleError) -> Self {
        PatchError::BadPatch(error.to_string())
    }
}

impl From<LinkError> for PatchError {
    fn from(error: LinkError) -> Self {
        PatchError::BadPatch(error.to_string())
    }
}

impl From<TargetError> for PatchError {
    fn from(error: TargetError) -> Self {
        LinkError::from(error).into()
    }
}

/// Places and links `module` for the guest; with `others` in it already.
///
/// # Errors
/// [`PatchError`] with every piece given back.
pub fn prepare<M: Machine>(
    machine: &mut M,
    guest: &mut Guest,
    places: &mut PatchMemory,
    module: &LivepatchModule,
    others: &[Patch],
) -> Result<Patch, PatchError> {
    let facts = guest.facts()?.clone();
    let kernel = &guest.kernel;
    let olds = {
        let memory = kernel.memory(machine.memory());
        old_functions(kernel, &memory, &facts, module, others)?
    };
    let mut taken = Vec::new();
    let functions = olds.len() as u64;
    let pieces = take_pieces(
        machine,
        (kernel, &facts),
        places,
        (module.sizes(), functions),
        &mut taken,
    );
    let built =
        pieces.and_then(|pieces| build(machine, guest, &facts, (module, others), olds, &pieces));
    if built.is_err() {
        taken.into_iter().for_each(|piece| places.give_back(piece));
    }
    built
}

/// Takes room for a module of these sizes with so many functions; `taken` is all that was taken, also when that fails half way.
fn take_pieces<M: Machine>(
    machine: &mut M,
    (kernel, facts): (&Kernel, &KernelInfo),
    places: &mut PatchMemory,
    (sizes, functions): (Sizes, u64),
    taken: &mut Vec<Allocation>,
) -> Result<Pieces, PatchError> {
    let mut take_data = |machine: &mut M, places: &mut PatchMemory, need| {
        let piece = places.take_data(machine, kernel, facts, need)?;
        taken.push(piece);
        Ok::<_, PatchError>(piece)
    };
    let table = match facts.klp {
        Some(_) => None,
        None => {
            let tasks = kernel.symbols.address("nr_threads")?;
            let tasks = kernel.memory(machine.memory()).u32(tasks)?;
            Some(take_data(
                machine,
                places,
                PendingTable::need(tasks.into()),
            )?)
        }
    };
    let data_need = Request {
        len: sizes.data,
        align: sizes.data_align,
    };
    let data = match sizes.data {
        0 => None,
        _ => Some(take_data(machine, places, data_need)?),
    };
    let ask = ask(facts, table)?;
    let stubs_at = sizes.code.next_multiple_of(STUB_ALIGN);
    let stubs_len = ask.stub_room() * functions;
    let need = Request {
        len: stubs_at.saturating_add(stubs_len),
        align: sizes.code_align.max(STUB_ALIGN),
    };
    let code = places.take_code(machine, kernel, facts, need)?;
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
fn ask(facts: &KernelInfo, table: Option<Allocation>) -> Result<StateSource, PatchError> {
    if let Some(table) = table {
        return Ok(StateSource::PendingTasks(PendingTable::in_piece(table)));
    }
    let offset = facts.klp.as_ref().map(|klp| klp.patch_state.offset);
    let offset = offset.and_then(|offset| u32::try_from(offset).ok());
    offset
        .map(StateSource::PatchState)
        .ok_or_else(|| PatchError::Guest("task_struct.patch_state is out of reach".into()))
}

/// Puts the data of `patch` into its hidden memory, which the guest does not see yet.
///
/// # Errors
/// [`PatchError`].
pub fn fill<M: Machine>(
    machine: &mut M,
    kernel: &Kernel,
    places: &PatchMemory,
    patch: &Patch,
) -> Result<(), PatchError> {
    let Some(data) = patch.data else {
        return Ok(());
    };
    let mut plan = WriteBatch::new();
    let memory = kernel.memory(machine.memory());
    places.plan_fill(&memory, data, &patch.image.data, &mut plan)?;
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
    facts: &KernelInfo,
    (module, others): (&LivepatchModule, &[Patch]),
    olds: Vec<PatchedFunction>,
    pieces: &Pieces,
) -> Result<Patch, PatchError> {
    let code_base = pieces.code.range.start;
    let bases = Bases {
        code: code_base,
        data: pieces.data.map_or(code_base, |data| data.range.start),
    };
    let image = {
        let memory = guest.kernel.memory(machine.memory());
        module::link(module, &GuestTarget::new(&guest.kernel, &memory), bases)?
    };
    let stubs_start = code_base.add(pieces.stubs_at);
    let stubs = GvaRange::new(stubs_start, stubs_start.add(pieces.stubs_len));
    let redirects = redirects(&image, olds, stubs.start, pieces.ask)?;
    let replaces = match image.replace {
        true => others.iter().map(replaced).collect(),
        false => Vec::new(),
    };
    let code_bytes = code_bytes(&image, &redirects, facts, (pieces.ask, pieces.stubs_at))?;
    let region = add_region(&mut guest.unwinder, &image)?;
    guest.unwinder.add_transient(stubs);
    Ok(Patch {
        image,
        redirects,
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
        transition: None,
        past: TransitionSummary::default(),
    })
}

/// The functions that `module` replaces, each with its entry, and behind them those that its coming makes the kernel's own again;
/// the addresses of new functions and stubs are yet to come.
fn old_functions(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    facts: &KernelInfo,
    module: &LivepatchModule,
    others: &[Patch],
) -> Result<Vec<PatchedFunction>, PatchError> {
    let layout = GuestTarget::new(kernel, memory).klp_layout()?;
    let patch = module.patch(&layout)?;
    let mut olds: Vec<PatchedFunction> = Vec::new();
    for function in &patch.functions {
        let name = (function.old_name.as_str(), function.sympos);
        let old = old_function(kernel, memory, facts, name, others)?;
        if olds.iter().any(|other| other.site.at == old.site.at) {
            return Err(PatchError::BadPatch(format!(
                "the module replaces function {} twice",
                old.name
            )));
        }
        olds.push(old);
    }
    if patch.replace {
        let left = func_stack::all(others).into_iter();
        let left = left.filter(|old| olds.iter().all(|other| other.site.at != old.site.at));
        let original_again: Vec<PatchedFunction> = left
            .map(|old| PatchedFunction {
                new: Target::Original,
                below: old.new,
                below_code: func_stack::below(
                    others,
                    old.body.first().unwrap_or(&GvaRange::default()),
                )
                .1,
                covered_by: None,
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
    facts: &KernelInfo,
    (name, sympos): (&str, u64),
    others: &[Patch],
) -> Result<PatchedFunction, PatchError> {
    let found = module::resolve_function(&kernel.symbols, name, sympos)?;
    let site = match func_stack::top(others, &found.range) {
        // What stands there is ours, and the pause makes sure that it still does.
        Some((_, newest)) => newest.site,
        None => free_site(kernel, memory, facts, name, found.range.start)?,
    };
    let (below, below_code) = func_stack::below(others, &found.range);
    Ok(PatchedFunction {
        name: name.into(),
        sympos,
        body: found.ranges().collect(),
        new: Target::Original,
        below,
        below_code,
        covered_by: None,
        site,
        stub: Gva::NULL,
    })
}

fn free_site(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    facts: &KernelInfo,
    name: &str,
    entry: Gva,
) -> Result<Site, PatchError> {
    let name_of = |at| match kernel.symbolize(at) {
        Some((symbol, 0)) => symbol.name.to_string(),
        Some((symbol, offset)) => format!("{}+{offset:#x}", symbol.name),
        None => at.to_string(),
    };
    let site = Site::find(memory, &facts.ftrace, facts.ftrace_pages, entry, name_of);
    site.map_err(|why| PatchError::Site {
        function: name.into(),
        at: entry,
        why: why.to_string(),
    })
}

/// Gives the old functions their stubs, and those that the module replaces their new ones.
fn redirects(
    image: &Image,
    mut olds: Vec<PatchedFunction>,
    stubs: Gva,
    ask: StateSource,
) -> Result<Vec<PatchedFunction>, PatchError> {
    if image.functions.len() > olds.len() {
        return Err(PatchError::BadPatch(format!(
            "the linked module has {} functions, and {} were asked for",
            image.functions.len(),
            olds.len()
        )));
    }
    for (old, new) in olds.iter_mut().zip(&image.functions) {
        if (&old.name, old.sympos) != (&new.old_name, new.sympos) {
            return Err(PatchError::BadPatch(format!(
                "the linked module replaces {} where {} was asked for",
                new.old_name, old.name
            )));
        }
        old.new = Target::Patched(new.new);
    }
    for (old, at) in olds.iter_mut().zip(0u64..) {
        old.stub = stubs.add(at * ask.stub_room());
    }
    Ok(olds)
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
    redirects: &[PatchedFunction],
    facts: &KernelInfo,
    (ask, stubs_at): (StateSource, u64),
) -> Result<Vec<u8>, PatchError> {
    let filler = crate::memory::cave::FILLER;
    let mut bytes = image.code.clone();
    bytes.resize(usize::try_from(stubs_at).unwrap_or_default(), filler);
    for redirect in redirects {
        let (old, new) = (
            redirect.code_of(redirect.below),
            redirect.code_of(redirect.new),
        );
        let mut stub = entry_stub::stub(redirect.stub, facts.current, ask, old, new)?;
        stub.resize(usize::try_from(ask.stub_room()).unwrap_or_default(), filler);
        bytes.append(&mut stub);
    }
    Ok(bytes)
}

/// Makes the stubs of `patch` lead to what is below it now.
///
/// # Errors
/// [`PatchError`].
pub fn renew_stubs(patch: &mut Patch, facts: &KernelInfo) -> Result<(), PatchError> {
    let stubs_at = patch.stubs.start.since(patch.code.range.start);
    let ask = ask(facts, patch.table)?;
    let bytes = code_bytes(&patch.image, &patch.redirects, facts, (ask, stubs_at))?;
    patch.stubs_changed |= bytes != patch.code_bytes;
    patch.code_bytes = bytes;
    Ok(())
}

fn add_region(
    unwinder: &mut Unwinder,
    image: &Image,
) -> Result<Option<introspect::unwind::RegionId>, PatchError> {
    if image.orc.is_empty() {
        return Ok(None);
    }
    let bad = |error: String| PatchError::BadPatch(format!("its unwind data: {error}"));
    let entries = image.orc.iter().map(|record| (record.ip, record.entry));
    let orc = OrcTable::from_unsorted(entries.collect(), unwinder.encoding())
        .map_err(|error| bad(error.to_string()))?;
    let region = CodeRegion {
        name: image.name.clone(),
        text: image.text,
        orc,
        fingerprint: Vec::new(),
    };
    let id = unwinder
        .add_region(region)
        .map_err(|error| bad(error.to_string()))?;
    Ok(Some(id))
}
