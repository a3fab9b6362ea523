//! The priority of the threads that answer for a guest.
//!
//! While the control thread works, a guest may stand still and a transition waits for its next step. On a host with more vCPUs than
//! processors it would wait for its turn behind those that never rest, of this guest and of others.

use rustix::io;
use rustix::process::{getpriority_process, setpriority_process};

/// As far in front as a nice value goes: with half of that, two vCPUs that never rest still take a fifth of the time of a guest that
/// stands still. What a host has of real-time work stays in front.
const NICE: i32 = -20;

/// Lets the thread that calls go before vCPUs, where the host allows that (`CAP_SYS_NICE` or `RLIMIT_NICE`); elsewhere nothing changes.
///
/// On Linux this is about the one thread, and those that it starts (setpriority(2)).
pub(super) fn go_before_vcpus() {
    if let Err(error) = raise_to(NICE) {
        tracing::debug!("this thread waits for its turn like vCPUs do: {error}");
    }
}

/// Only ever raises: a VMM that was started further in front has its vCPUs there, too.
fn raise_to(nice: i32) -> io::Result<()> {
    if getpriority_process(None)? > nice {
        setpriority_process(None, nice)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Runs `raised` in a thread of its own: what it says, and the priority that the thread has then.
    fn in_a_thread<T: Send + 'static>(raised: impl FnOnce() -> T + Send + 'static) -> (T, i32) {
        thread::spawn(|| (raised(), getpriority_process(None).unwrap()))
            .join()
            .unwrap()
    }

    #[test]
    fn one_thread_goes_before_the_others_where_it_may() {
        let ours = getpriority_process(None).unwrap();
        let ((), theirs) = in_a_thread(go_before_vcpus);
        assert_eq!(getpriority_process(None).unwrap(), ours);
        // Root in a container may lack CAP_SYS_NICE: the kernel is asked.
        let (may, _) = in_a_thread(|| setpriority_process(None, NICE).is_ok());
        assert_eq!(theirs, if may { ours.min(NICE) } else { ours });
    }

    /// To go back is allowed to everyone, so this holds on every host.
    #[test]
    fn a_thread_further_in_front_stays_there() {
        let ours = getpriority_process(None).unwrap();
        let (raised, theirs) = in_a_thread(move || raise_to(ours + 1));
        assert_eq!((raised, theirs), (Ok(()), ours));
    }
}
