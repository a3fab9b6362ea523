//! The priority of the threads that answer for a guest.
//!
//! While the control thread works, a guest may stand still and a transition waits for its next step. On a host with more vCPUs than
//! processors it would wait for its turn behind those that never rest, of this guest and of others.

use rustix::process::setpriority_process;

/// Half way to what goes before all else: a host's own urgent work stays in front.
const NICE: i32 = -10;

/// Lets the thread that calls go before vCPUs, where the host allows that (`CAP_SYS_NICE` or `RLIMIT_NICE`); elsewhere nothing changes.
///
/// On Linux this is about the one thread, and those that it starts (setpriority(2)).
pub(super) fn go_before_vcpus() {
    if let Err(error) = setpriority_process(None, NICE) {
        tracing::debug!("this thread waits for its turn like vCPUs do: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::process::getpriority_process;

    use super::*;

    #[test]
    fn one_thread_goes_before_the_others_where_it_may() {
        let ours = getpriority_process(None).unwrap();
        let theirs = thread::spawn(|| {
            go_before_vcpus();
            getpriority_process(None).unwrap()
        })
        .join()
        .unwrap();
        assert_eq!(getpriority_process(None).unwrap(), ours);
        // Root in a container may lack CAP_SYS_NICE: the kernel is asked.
        let may = thread::spawn(|| setpriority_process(None, NICE).is_ok())
            .join()
            .unwrap();
        assert_eq!(theirs, if may { NICE } else { ours });
    }
}
