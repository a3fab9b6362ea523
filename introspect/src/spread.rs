//! One piece of work for many items, over as many threads as it is worth.
//!
//! Knows nothing of guests.

use std::thread;

/// More threads than this gain little: they wait for the same memory.
const MOST: usize = 8;

/// What `work` makes of `items`, in their order: it is given them in parts of at least `least`, each in a thread of its own where the
/// machine has a processor for it. A part for which there is no thread is done in this one.
pub(crate) fn spread<T: Sync, R: Send>(
    items: &[T],
    least: usize,
    work: impl Fn(&[T]) -> Vec<R> + Sync,
) -> Vec<R> {
    let worth = items.len() / least.max(1);
    // Asking for the number of processors costs some system calls.
    let threads = match worth {
        0 | 1 => 1,
        _ => worth
            .min(MOST)
            .min(thread::available_parallelism().map_or(1, usize::from)),
    };
    over(threads, items, work)
}

fn over<T: Sync, R: Send>(
    threads: usize,
    items: &[T],
    work: impl Fn(&[T]) -> Vec<R> + Sync,
) -> Vec<R> {
    let part = items.len().div_ceil(threads.max(1)).max(1);
    let (ours, others) = items.split_at(part.min(items.len()));
    let work = &work;
    thread::scope(|scope| {
        let start = |part| {
            let thread = thread::Builder::new().spawn_scoped(scope, move || work(part));
            (part, thread.ok())
        };
        let others: Vec<_> = others.chunks(part).map(start).collect();
        let mut all = work(ours);
        for (part, thread) in others {
            let done = thread.and_then(|thread| thread.join().ok());
            all.extend(done.unwrap_or_else(|| work(part)));
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn whatever_the_parts_the_order_is_kept() {
        for len in [0, 1, 2, 7, 8, 9, 100] {
            let items: Vec<usize> = (0..len).collect();
            let squares: Vec<usize> = items.iter().map(|n| n * n).collect();
            for threads in [0, 1, 2, 3, 8, 200] {
                let parts = AtomicUsize::new(0);
                let done = over(threads, &items, |part| {
                    parts.fetch_add(1, Ordering::Relaxed);
                    part.iter().map(|n| n * n).collect()
                });
                assert_eq!(done, squares, "{len} over {threads}");
                assert!(parts.into_inner() <= threads.max(1), "{len} over {threads}");
            }
        }
    }

    #[test]
    fn few_items_stay_in_this_thread() {
        let this = thread::current().id();
        let items = [(); 199];
        let ids = spread(&items, 100, |part| {
            part.iter().map(|()| thread::current().id()).collect()
        });
        assert_eq!(ids, [this; 199]);
    }
}
