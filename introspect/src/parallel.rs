//! One piece of work for many items, over as many threads as it is worth.
//!
//! Knows nothing of guests.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    thread,
};

/// More threads than this gain little: they wait for the same memory.
const MOST: usize = 8;

/// What `work` makes of `items`, in their order: it is given them in parts of at least `least`, each in a thread of its own where the
/// machine has a processor for it. A part for which there is no thread is done in this one.
pub(crate) fn spread<T: Sync, R: Send>(
    items: &[T],
    least: usize,
    work: impl Fn(&[T]) -> Vec<R> + Sync,
) -> Vec<R> {
    let threads = threads(items.len(), least);
    let part = items.len().div_ceil(threads).max(1);
    let parts = || items.chunks(part).enumerate();
    let done = over(threads, parts(), |parts| {
        parts.map(|(n, part)| (n, work(part))).collect::<Vec<_>>()
    });
    let mut done: Vec<_> = done.into_iter().flatten().flatten().collect();
    done.sort_unstable_by_key(|(n, _)| *n);
    let mut done = done.into_iter().peekable();
    let each = parts().flat_map(|(n, part)| match done.next_if(|(of, _)| *of == n) {
        Some((_, done)) => done,
        // Its thread ended in a panic.
        None => work(part),
    });
    each.collect()
}

/// How many threads so many items are worth, if each is to have at least `least`; one at the least.
pub(crate) fn threads(items: usize, least: usize) -> usize {
    // Asking for them costs some system calls, and reads some files.
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    let processors = || thread::available_parallelism().map_or(1, usize::from);
    match items / least.max(1) {
        0 | 1 => 1,
        worth => worth.min(MOST).min(*PROCESSORS.get_or_init(processors)),
    }
}

/// Parts that several threads take one after the other, each when it is done with the last: one that starts late takes fewer.
pub(crate) struct Parts<'q, I>(&'q Mutex<I>);

impl<I: Iterator> Iterator for Parts<'_, I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next()
    }
}

/// What `work` makes of the parts it takes, in so many threads, of which this is one. None of a thread that ended in a panic; one that
/// could not be started leaves the parts to the others.
pub(crate) fn over<I: Iterator + Send, R: Send>(
    threads: usize,
    parts: I,
    work: impl Fn(Parts<'_, I>) -> R + Sync,
) -> Vec<Option<R>> {
    let (parts, work) = (&Mutex::new(parts), &work);
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, move || work(Parts(parts)));
        let others: Vec<_> = (1..threads).flat_map(start).collect();
        let ours = Some(work(Parts(parts)));
        let others = others.into_iter().map(|thread| thread.join().ok());
        std::iter::once(ours).chain(others).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn each_part_is_taken_once() {
        for len in [0, 1, 2, 7, 8, 9, 100] {
            let items: Vec<usize> = (0..len).collect();
            for threads in [1, 2, 3, 8, 200] {
                let taken = AtomicUsize::new(0);
                let done = over(threads, items.chunks(3).enumerate(), |parts| {
                    let each = parts.inspect(|_| {
                        taken.fetch_add(1, Ordering::Relaxed);
                    });
                    each.collect::<Vec<_>>()
                });
                let mut done: Vec<_> = done.into_iter().flatten().flatten().collect();
                done.sort_unstable();
                assert!(
                    done.into_iter().eq(items.chunks(3).enumerate()),
                    "{len} over {threads}"
                );
                assert_eq!(taken.into_inner(), len.div_ceil(3), "{len} over {threads}");
            }
        }
    }

    #[test]
    fn the_order_is_kept_whatever_becomes_of_a_thread() {
        let this = thread::current().id();
        for len in [0, 1, 2, 7, 8, 9, 100] {
            let items: Vec<usize> = (0..len).collect();
            let squares: Vec<usize> = items.iter().map(|n| n * n).collect();
            for panics in [false, true] {
                let done = spread(&items, 1, |part| {
                    assert!(!panics || thread::current().id() == this, "on purpose");
                    part.iter().map(|n| n * n).collect()
                });
                assert_eq!(done, squares);
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
