//! Lists the tasks of a live guest, and whether their stacks are reliable, in short pauses:
//! `cargo run --example live -p introspect -- guest.core`.
//!
//! A VMM implements `LiveGuest` for its own guests. To have something to run on, this example
//! copies the memory of a core file into a `GuestMemoryMmap` and treats it as a guest whose vCPUs
//! never run.

use std::error::Error;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use introspect::{
    CoreFile, FindError, Kernel, PhysMemory, Stack, Task, TaskCache, TasksError, Unwinder, VcpuRegs,
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// All that a VMM must provide.
trait LiveGuest {
    /// The guest's memory, mapped into this process.
    fn memory(&self) -> &(impl GuestMemory + Sync);

    /// Stops every vCPU, calls `read` with their registers, and resumes them.
    fn while_paused<T>(&self, read: impl FnOnce(&[VcpuRegs]) -> T) -> T;
}

/// How often a guest that is changing its list of tasks is paused again.
const MAX_TRIES: u32 = 10;
/// How long the guest runs in between.
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// What is known of a guest from one pause to the next.
struct Observer<'g, G> {
    guest: &'g G,
    kernel: Kernel,
    unwinder: Unwinder,
    tasks: TaskCache,
}

impl<'g, G: LiveGuest> Observer<'g, G> {
    /// Finds the guest's kernel: hundreds of milliseconds, once.
    fn new(guest: &'g G) -> Result<Self, Box<dyn Error>> {
        // A pause is needed for the registers only. What is found does not change once the guest
        // runs, but the page tables of a process that was running may: then read in a pause.
        let vcpus = guest.while_paused(<[VcpuRegs]>::to_vec);
        let kernel = match Kernel::find(guest.memory(), &vcpus) {
            Err(error @ FindError::NotReady(_)) => Err(error),
            Err(_) => guest.while_paused(|vcpus| Kernel::find(guest.memory(), vcpus)),
            found => found,
        }?;
        let unwinder = Unwinder::new(&kernel, &kernel.memory(guest.memory()))?;
        Ok(Observer {
            guest,
            kernel,
            unwinder,
            tasks: TaskCache::new(),
        })
    }

    /// All tasks and their stacks, as of one pause.
    fn observe(&mut self) -> Result<Vec<(Task, Stack)>, Box<dyn Error>> {
        let guest = self.guest;
        for _ in 0..MAX_TRIES {
            // Most of the work, while the guest runs. The result is a hint; `refresh` checks it.
            let memory = self.kernel.memory(guest.memory());
            self.tasks.prewalk(&self.kernel, &self.unwinder, &memory);

            match guest.while_paused(|vcpus| self.observe_paused(vcpus)) {
                // The guest is changing its list of tasks: let it finish.
                Err(TasksError::Busy(lock)) => {
                    eprintln!("{lock} is held; retrying");
                    sleep(RETRY_DELAY);
                }
                result => return Ok(result?),
            }
        }
        Err(format!("the guest was busy in each of {MAX_TRIES} pauses").into())
    }

    fn observe_paused(&mut self, vcpus: &[VcpuRegs]) -> Result<Vec<(Task, Stack)>, TasksError> {
        let (kernel, unwinder) = (&self.kernel, &mut self.unwinder);
        // It caches address translations, so each pause needs its own.
        let memory = kernel.memory(self.guest.memory());
        if !kernel.is_running(&memory, vcpus) {
            // A VMM would make a new `Observer`.
            eprintln!("the guest has started another kernel");
        }
        if let Err(error) = unwinder.refresh(kernel, &memory) {
            // Stacks that contain module code are unreliable then.
            eprintln!("{error}");
        }
        self.tasks.refresh(kernel, unwinder, &memory, vcpus)?;
        let with_stack = self.tasks.tasks().iter().map(|cached| {
            let regs = vcpus
                .iter()
                .find(|regs| Some(regs.index) == cached.task.vcpu);
            let stack = cached.stack(unwinder, &memory, regs).into_owned();
            (cached.task.clone(), stack)
        });
        Ok(with_stack.collect())
    }
}

/// A core file's memory and registers in place of a VMM's guest.
struct StandIn {
    memory: GuestMemoryMmap,
    vcpus: Vec<VcpuRegs>,
}

impl LiveGuest for StandIn {
    fn memory(&self) -> &(impl GuestMemory + Sync) {
        &self.memory
    }

    fn while_paused<T>(&self, read: impl FnOnce(&[VcpuRegs]) -> T) -> T {
        read(&self.vcpus)
    }
}

impl StandIn {
    fn open(path: &Path) -> Result<StandIn, Box<dyn Error>> {
        let core = CoreFile::open(path)?;
        let mut ranges = Vec::new();
        for (start, len) in core.ranges() {
            ranges.push((start, usize::try_from(len)?));
        }
        let memory = GuestMemoryMmap::from_ranges(&ranges)?;
        let mut buf = vec![0; 1 << 20];
        for (start, len) in ranges {
            for offset in (0..len).step_by(buf.len()) {
                let at = GuestAddress(start.0 + offset as u64);
                let chunk = &mut buf[..(len - offset).min(1 << 20)];
                core.read(at, chunk)?;
                memory.write_slice(chunk, at)?;
            }
        }
        let vcpus = core.vcpus().to_vec();
        Ok(StandIn { memory, vcpus })
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("which core file?")?;
    let guest = StandIn::open(Path::new(&path))?;
    let mut observer = Observer::new(&guest)?;
    println!("{}", observer.kernel.banner);
    for (task, stack) in observer.observe()? {
        let (frames, verdict) = (stack.frames.len(), stack.verdict);
        println!("{} {}: {frames} frames, {verdict}", task.pid, task.comm);
    }
    Ok(())
}
