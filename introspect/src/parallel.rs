//! One piece of work for many items, on as many threads as pay off.
//!
//! This module knows nothing of guests.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// The most threads that are used: more of them gain little, as they wait for the same memory.
const MAX_THREADS: usize = 8;

/// The results of `work` for `items`, in the order of the items.
///
/// `work` gets the items in chunks of at least `min_chunk`, each on a thread of its own where the
/// machine has a processor for it. The calling thread does the chunks of a thread that panicked or
/// could not be started.
pub(crate) fn map<T: Sync, R: Send>(
    items: &[T],
    min_chunk: usize,
    work: impl Fn(&[T]) -> Vec<R> + Sync,
) -> Vec<R> {
    let threads = threads(items.len(), min_chunk);
    let chunk = items.len().div_ceil(threads).max(1);
    let chunks = || items.chunks(chunk).enumerate();
    let done = for_each(threads, chunks(), |taken| {
        taken.map(|(n, chunk)| (n, work(chunk))).collect::<Vec<_>>()
    });
    let mut done: Vec<_> = done.into_iter().flatten().flatten().collect();
    done.sort_unstable_by_key(|(n, _)| *n);
    let mut done = done.into_iter().peekable();
    let results = chunks().flat_map(|(n, chunk)| match done.next_if(|(of, _)| *of == n) {
        Some((_, results)) => results,
        // Its thread panicked.
        None => work(chunk),
    });
    results.collect()
}

/// The number of threads to use for `items` when each should have at least `min_chunk` of them: at
/// least one, at most [`MAX_THREADS`] and the number of processors.
pub(crate) fn threads(items: usize, min_chunk: usize) -> usize {
    // Finding the number costs some system calls, and reads some files.
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    let processors = || thread::available_parallelism().map_or(1, usize::from);
    match items / min_chunk.max(1) {
        0 | 1 => 1,
        wanted => wanted
            .min(MAX_THREADS)
            .min(*PROCESSORS.get_or_init(processors)),
    }
}

/// A queue of parts that several threads share. Each thread takes the next part when it is done
/// with its last one, so a thread that starts late takes fewer.
pub(crate) struct Parts<'q, I>(&'q Mutex<I>);

impl<I: Iterator> Iterator for Parts<'_, I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next()
    }
}

/// Runs `work` once on each of `threads` threads, the calling one included, and lets them take
/// `parts` from one queue until none is left.
///
/// The result is what each thread returned, `None` for one that panicked: the part that it had
/// taken is lost. If a thread cannot be started, the others take its parts.
pub(crate) fn for_each<I: Iterator + Send, R: Send>(
    threads: usize,
    parts: I,
    work: impl Fn(Parts<'_, I>) -> R + Sync,
) -> Vec<Option<R>> {
    let (parts, work) = (&Mutex::new(parts), &work);
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, move || work(Parts(parts)));
        let others: Vec<_> = (1..threads).flat_map(start).collect();
        let own = Some(work(Parts(parts)));
        let others = others.into_iter().map(|thread| thread.join().ok());
        std::iter::once(own).chain(others).collect()
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
                let done = for_each(threads, items.chunks(3).enumerate(), |parts| {
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
    fn the_order_is_kept_even_if_a_thread_panics() {
        let this = thread::current().id();
        for len in [0, 1, 2, 7, 8, 9, 100] {
            let items: Vec<usize> = (0..len).collect();
            let squares: Vec<usize> = items.iter().map(|n| n * n).collect();
            for panics in [false, true] {
                let done = map(&items, 1, |part| {
                    assert!(!panics || thread::current().id() == this, "on purpose");
                    part.iter().map(|n| n * n).collect()
                });
                assert_eq!(done, squares);
            }
        }
    }

    #[test]
    fn few_items_stay_on_this_thread() {
        let this = thread::current().id();
        let items = [(); 199];
        let ids = map(&items, 100, |part| {
            part.iter().map(|()| thread::current().id()).collect()
        });
        assert_eq!(ids, [this; 199]);
    }
}
