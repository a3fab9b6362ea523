//! All vCPUs of a machine together: started, stopped at any moment, let go, ended.
//!
//! A pause is a broadcast and then a collection of answers, so that its length does not grow with the number of vCPUs. Pauses
//! nest across all users (the operator, the patcher): the first stops the vCPUs, the last resume lets them go.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use introspect::VcpuRegs;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::console::output::Output;
use crate::vm::error::PauseError;
use crate::vm::kvm_run::ImmediateExit;
use crate::vm::vcpu::{Buses, Command, EndReporter, ExitReason, ExitedVcpu, Stopped, Vcpu};

/// How long a pause waits for its answers before it gives up. A vCPU answers in microseconds; on a host so busy that its
/// threads do not run, in seconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// What all pauses together have cost the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseStats {
    /// How many times all vCPUs were stopped.
    pub count: u64,
    /// Sum of the pauses, each from the first vCPU stopped to the last one told to go on.
    pub total: Duration,
    /// The longest of them.
    pub longest: Duration,
    /// The longest time from a request to the last vCPU's answer.
    pub slowest_answer: Duration,
}

/// One vCPU, from outside its thread.
#[derive(Debug)]
struct VcpuThread {
    commands: Sender<Command>,
    exit: Arc<ImmediateExit>,
    thread: JoinHandle<()>,
}

impl VcpuThread {
    /// Gives a command to a vCPU that may be in the guest. False: its thread has gone.
    fn interrupt(&self, command: Command) -> bool {
        // The order matters: see `ImmediateExit`.
        let sent = self.commands.send(command).is_ok();
        self.exit.set();
        let _ = self.thread.kill(kick_signal());
        sent
    }
}

#[derive(Debug, Default)]
struct Pauses {
    depth: u32,
    /// Registers by vCPU, valid while `depth` is not 0.
    regs: Vec<Result<VcpuRegs, String>>,
    /// When the first vCPU of the present pause stopped.
    since: Option<Instant>,
    ended: bool,
    stats: PauseStats,
}

/// The vCPUs of one machine.
#[derive(Debug)]
pub struct Vcpus {
    lanes: Mutex<Vec<VcpuThread>>,
    count: u32,
    pauses: Mutex<Pauses>,
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Being interrupted is all that the signal is for.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Starts a thread for each vCPU, stopped, as after one [`pause`](Self::pause).
    ///
    /// # Errors
    /// When no thread can be started or a file descriptor is lacking.
    pub fn start(
        vcpus: Vec<(VcpuFd, ImmediateExit)>,
        buses: &Arc<Buses>,
        output: &Output,
        ends: &EndReporter,
    ) -> std::io::Result<Vcpus> {
        register_signal_handler(kick_signal(), on_kick).map_err(std::io::Error::from)?;
        let mut lanes = Vec::new();
        for (index, (fd, exit)) in (0_u32..).zip(vcpus) {
            let exit = Arc::new(exit);
            let (commands, receiver) = channel();
            let vcpu = Vcpu::new(
                (index, fd, Arc::clone(&exit)),
                Arc::clone(buses),
                output.clone(),
                receiver,
                ends.try_clone()?,
            );
            let ends = ends.try_clone()?;
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| vcpu.run()))
                        .is_err()
                    {
                        ends.report(ExitedVcpu {
                            index,
                            end: ExitReason::Panicked,
                            regs: Err("the vCPU's thread panicked".to_owned()),
                        });
                    }
                })?;
            lanes.push(VcpuThread {
                commands,
                exit,
                thread,
            });
        }
        let count = u32::try_from(lanes.len()).unwrap_or(u32::MAX);
        Ok(Vcpus {
            lanes: Mutex::new(lanes),
            count,
            pauses: Mutex::new(Pauses {
                depth: 1,
                regs: (0..count)
                    .map(|index| Err(format!("vCPU {index} has not started")))
                    .collect(),
                since: None,
                ended: false,
                stats: PauseStats::default(),
            }),
        })
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Stops every vCPU; returns when each is outside the guest with no I/O pending.
    ///
    /// # Errors
    /// [`PauseError::GuestEnded`], [`PauseError::NoAnswer`]; no vCPU stays stopped for this call then.
    pub fn pause(&self) -> Result<(), PauseError> {
        let mut pauses = self.pauses();
        if pauses.ended {
            return Err(PauseError::GuestEnded);
        }
        if pauses.depth == 0 {
            let asked = Instant::now();
            let stopped = self.stop_all()?;
            pauses.since = stopped.iter().map(|stopped| stopped.at).min();
            pauses.stats.count += 1;
            pauses.stats.slowest_answer = pauses.stats.slowest_answer.max(asked.elapsed());
            pauses.regs = stopped.into_iter().map(|stopped| stopped.regs).collect();
        }
        pauses.depth += 1;
        Ok(())
    }

    /// Undoes one [`pause`](Self::pause); the last one lets the vCPUs go.
    ///
    /// # Errors
    /// [`PauseError::NotPaused`].
    pub fn resume(&self) -> Result<(), PauseError> {
        let mut pauses = self.pauses();
        pauses.depth = pauses.depth.checked_sub(1).ok_or(PauseError::NotPaused)?;
        if pauses.depth == 0 {
            self.release_all();
            if let Some(since) = pauses.since.take() {
                let length = since.elapsed();
                pauses.stats.total += length;
                pauses.stats.longest = pauses.stats.longest.max(length);
            }
        }
        Ok(())
    }

    /// The registers of every vCPU, in order of index.
    ///
    /// # Errors
    /// [`PauseError::NotPaused`], [`PauseError::Unreadable`].
    pub fn regs(&self) -> Result<Vec<VcpuRegs>, PauseError> {
        let pauses = self.pauses();
        if pauses.depth == 0 {
            return Err(PauseError::NotPaused);
        }
        pauses
            .regs
            .iter()
            .cloned()
            .collect::<Result<_, _>>()
            .map_err(PauseError::Unreadable)
    }

    /// What the pauses have cost so far.
    #[must_use]
    pub fn stats(&self) -> PauseStats {
        self.pauses().stats
    }

    /// Ends every vCPU thread, paused or not. From here on, [`pause`](Self::pause) says [`PauseError::GuestEnded`].
    pub fn end(&self) {
        self.pauses().ended = true;
        let lanes = std::mem::take(&mut *self.lanes());
        for lane in &lanes {
            lane.interrupt(Command::Quit);
        }
        for lane in lanes {
            // A panic in the thread was reported by the thread itself.
            let _ = lane.thread.join();
        }
    }

    fn pauses(&self) -> MutexGuard<'_, Pauses> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lanes(&self) -> MutexGuard<'_, Vec<VcpuThread>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop_all(&self) -> Result<Vec<Stopped>, PauseError> {
        let lanes = self.lanes();
        let (sender, receiver) = channel();
        for lane in lanes.iter() {
            lane.interrupt(Command::Pause(sender.clone()));
        }
        // From here on only vCPU threads hold senders: when a thread goes without an answer, `recv` does not wait for it.
        drop(sender);
        let deadline = Instant::now() + ANSWER_WITHIN;
        let mut stopped: Vec<Stopped> = Vec::with_capacity(lanes.len());
        let failed = loop {
            if stopped.len() == lanes.len() {
                stopped.sort_by_key(|stopped| stopped.index);
                return Ok(stopped);
            }
            match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(answer) => stopped.push(answer),
                Err(RecvTimeoutError::Disconnected) => break PauseError::GuestEnded,
                Err(RecvTimeoutError::Timeout) => {
                    let silent = (0..self.count)
                        .find(|index| stopped.iter().all(|stopped| stopped.index != *index));
                    break PauseError::NoAnswer {
                        vcpu: silent.unwrap_or(0),
                        waited: ANSWER_WITHIN,
                    };
                }
            }
        };
        drop(lanes);
        self.release_all();
        Err(failed)
    }

    fn release_all(&self) {
        for lane in self.lanes().iter() {
            let _ = lane.commands.send(Command::Resume);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests;
