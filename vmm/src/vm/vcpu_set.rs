//! All vCPUs of a machine together: starts, pauses, resumes and ends their threads.
//!
//! A pause is a broadcast and then a collection of answers, so that its length does not grow with
//! the number of vCPUs. Pauses nest across all users (the operator, the patcher): the first pause
//! stops the vCPUs, the last resume lets them run again.
//!
//! This module knows vCPU threads and their registers; it must not know what a pause is for.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use introspect::VcpuRegs;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::console::output::Output;
use crate::devices::Buses;
use crate::vm::error::PauseError;
use crate::vm::kvm_run::ImmediateExit;
use crate::vm::regs::RegsError;
use crate::vm::vcpu::{Command, ExitReason, ExitReporter, ExitedVcpu, Stopped, Vcpu};

/// How long a pause waits for the answers of all vCPUs before it fails. A vCPU answers in
/// microseconds, or in seconds on a host so busy that the threads do not run.
const MAX_ANSWER_TIME: Duration = Duration::from_secs(30);

/// How often and for how long the vCPUs were paused, since the machine was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseStats {
    /// How many times all vCPUs were stopped. Nested pauses count as one.
    pub count: u64,
    /// Sum of the lengths of all pauses, each from when the first vCPU stopped to when the last one
    /// was told to resume.
    pub total: Duration,
    /// The length of the longest pause.
    pub longest: Duration,
    /// The longest time from the request for a pause to the last vCPU's answer.
    pub slowest_answer: Duration,
}

/// One vCPU thread, as seen from other threads.
#[derive(Debug)]
struct VcpuThread {
    commands: Sender<Command>,
    exit: Arc<ImmediateExit>,
    join_handle: JoinHandle<()>,
}

impl VcpuThread {
    /// Sends a command to a vCPU that may be in the guest. False: its thread has ended.
    fn interrupt(&self, command: Command) -> bool {
        // The order matters: see `ImmediateExit`.
        let sent = self.commands.send(command).is_ok();
        self.exit.set();
        let _ = self.join_handle.kill(kick_signal());
        sent
    }
}

/// The pauses that are held now, and what all pauses have cost.
#[derive(Debug, Default)]
struct Pauses {
    /// How many pauses are held.
    depth: u32,
    /// Registers by vCPU, valid while `depth` is not 0.
    regs: Vec<Result<VcpuRegs, RegsError>>,
    /// When the first vCPU stopped for the current pause.
    since: Option<Instant>,
    /// The threads have been told to end; there are no more pauses.
    ended: bool,
    stats: PauseStats,
}

/// The vCPUs of one machine.
#[derive(Debug)]
pub struct Vcpus {
    threads: Mutex<Vec<VcpuThread>>,
    count: u32,
    pauses: Mutex<Pauses>,
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Does nothing: the signal is sent only to interrupt `KVM_RUN`.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Starts a thread for each vCPU. The vCPUs are paused, as after one [`pause`](Self::pause).
    ///
    /// # Errors
    /// When a thread cannot be started or the process is out of file descriptors.
    pub fn start(
        vcpus: Vec<(VcpuFd, ImmediateExit)>,
        buses: &Arc<Buses>,
        output: &Output,
        exits: &ExitReporter,
    ) -> std::io::Result<Vcpus> {
        register_signal_handler(kick_signal(), on_kick).map_err(std::io::Error::from)?;
        let mut threads = Vec::new();
        for (index, (fd, exit)) in (0_u32..).zip(vcpus) {
            let exit = Arc::new(exit);
            let (commands, receiver) = channel();
            let vcpu = Vcpu::new(
                (index, fd, Arc::clone(&exit)),
                Arc::clone(buses),
                output.clone(),
                receiver,
                exits.try_clone()?,
            );
            let exits = exits.try_clone()?;
            let join_handle =
                thread::Builder::new()
                    .name(format!("vcpu{index}"))
                    .spawn(move || {
                        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| vcpu.run()))
                            .is_err()
                        {
                            exits.report(ExitedVcpu {
                                index,
                                reason: ExitReason::Panicked,
                                regs: Err(RegsError::Panicked),
                            });
                        }
                    })?;
            threads.push(VcpuThread {
                commands,
                exit,
                join_handle,
            });
        }
        let count = u32::try_from(threads.len()).unwrap_or(u32::MAX);
        Ok(Vcpus {
            threads: Mutex::new(threads),
            count,
            pauses: Mutex::new(Pauses {
                depth: 1,
                regs: (0..count)
                    .map(|index| Err(RegsError::NotStarted(index)))
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

    /// Stops every vCPU. Returns when each is outside the guest with no I/O pending.
    ///
    /// # Errors
    /// [`PauseError::GuestEnded`], [`PauseError::NoAnswer`]; in both cases this call leaves no vCPU
    /// stopped.
    pub fn pause(&self) -> Result<(), PauseError> {
        let mut pauses = self.pauses();
        if pauses.ended {
            return Err(PauseError::GuestEnded);
        }
        if pauses.depth == 0 {
            let requested = Instant::now();
            let stopped = self.stop_all()?;
            pauses.since = stopped.iter().map(|stopped| stopped.at).min();
            pauses.stats.count += 1;
            pauses.stats.slowest_answer = pauses.stats.slowest_answer.max(requested.elapsed());
            pauses.regs = stopped.into_iter().map(|stopped| stopped.regs).collect();
        }
        pauses.depth += 1;
        Ok(())
    }

    /// Undoes one [`pause`](Self::pause). The last one lets the vCPUs run again.
    ///
    /// # Errors
    /// [`PauseError::NotPaused`].
    pub fn resume(&self) -> Result<(), PauseError> {
        let mut pauses = self.pauses();
        pauses.depth = pauses.depth.checked_sub(1).ok_or(PauseError::NotPaused)?;
        if pauses.depth == 0 {
            self.resume_all();
            if let Some(since) = pauses.since.take() {
                let length = since.elapsed();
                pauses.stats.total += length;
                pauses.stats.longest = pauses.stats.longest.max(length);
            }
        }
        Ok(())
    }

    /// The registers of every vCPU, in order of their indices.
    ///
    /// # Errors
    /// [`PauseError::NotPaused`], [`PauseError::Unreadable`].
    pub fn regs(&self) -> Result<Vec<VcpuRegs>, PauseError> {
        let pauses = self.pauses();
        if pauses.depth == 0 {
            return Err(PauseError::NotPaused);
        }
        Ok(pauses.regs.iter().cloned().collect::<Result<_, _>>()?)
    }

    /// How often and for how long the vCPUs were paused so far.
    #[must_use]
    pub fn stats(&self) -> PauseStats {
        self.pauses().stats
    }

    /// Ends every vCPU thread, paused or not. After this, [`pause`](Self::pause) returns
    /// [`PauseError::GuestEnded`].
    pub fn end(&self) {
        self.pauses().ended = true;
        let threads = std::mem::take(&mut *self.threads());
        for thread in &threads {
            thread.interrupt(Command::Quit);
        }
        for thread in threads {
            // A panic in the thread was reported by the thread itself.
            let _ = thread.join_handle.join();
        }
    }

    fn pauses(&self) -> MutexGuard<'_, Pauses> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<VcpuThread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop_all(&self) -> Result<Vec<Stopped>, PauseError> {
        let threads = self.threads();
        let (sender, receiver) = channel();
        for thread in threads.iter() {
            thread.interrupt(Command::Pause(sender.clone()));
        }
        // Now only vCPU threads hold senders: if a thread ends without an answer, `recv` does not
        // wait for it.
        drop(sender);
        let deadline = Instant::now() + MAX_ANSWER_TIME;
        let mut stopped: Vec<Stopped> = Vec::with_capacity(threads.len());
        let error = loop {
            if stopped.len() == threads.len() {
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
                        waited: MAX_ANSWER_TIME,
                    };
                }
            }
        };
        drop(threads);
        self.resume_all();
        Err(error)
    }

    fn resume_all(&self) {
        for thread in self.threads().iter() {
            let _ = thread.commands.send(Command::Resume);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
pub(crate) mod tests;
