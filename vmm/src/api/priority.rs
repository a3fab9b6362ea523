//! The scheduling priority of the API thread and the control thread.
//!
//! While the control thread works, the guest may be paused, and a transition waits for its next
//! step. Without a raised priority, the control thread would have to wait for busy vCPUs, of this
//! guest and of others, on a host with more vCPUs than processors.

use rustix::io;
use rustix::process::{getpriority_process, setpriority_process};

/// The highest priority that a nice value gives: with -10, two busy vCPUs still lengthen a pause by
/// a fifth. Real-time tasks of the host keep their precedence.
const NICE: i32 = -20;

/// Raises the calling thread's priority above that of vCPUs, where the host allows it
/// (`CAP_SYS_NICE` or `RLIMIT_NICE`); otherwise changes nothing.
///
/// On Linux this affects the calling thread and those that it creates later (setpriority(2)).
pub(super) fn raise_above_vcpus() {
    if let Err(error) = raise_to(NICE) {
        tracing::debug!("this thread keeps the priority of vCPUs: {error}");
    }
}

/// Only raises: a VMM that was started with a higher priority has its vCPUs there, too.
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

    /// Runs `raised` in a thread of its own; returns its result, and the nice value of that thread.
    fn in_a_thread<T: Send + 'static>(raised: impl FnOnce() -> T + Send + 'static) -> (T, i32) {
        thread::spawn(|| (raised(), getpriority_process(None).unwrap()))
            .join()
            .unwrap()
    }

    #[test]
    fn one_thread_has_a_higher_priority_where_that_is_allowed() {
        let ours = getpriority_process(None).unwrap();
        let ((), theirs) = in_a_thread(raise_above_vcpus);
        assert_eq!(getpriority_process(None).unwrap(), ours);
        // Root in a container may lack CAP_SYS_NICE: whether it has, the kernel says.
        let (may, _) = in_a_thread(|| setpriority_process(None, NICE).is_ok());
        assert_eq!(theirs, if may { ours.min(NICE) } else { ours });
    }

    /// Lowering the priority is always allowed, so this holds on every host.
    #[test]
    fn a_thread_of_a_higher_priority_keeps_it() {
        let ours = getpriority_process(None).unwrap();
        let (raised, theirs) = in_a_thread(move || raise_to(ours + 1));
        assert_eq!((raised, theirs), (Ok(()), ours));
    }
}
