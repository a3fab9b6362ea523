//! Binary search in an array in guest memory.
//!
//! This module knows positions only: the caller reads the elements. The array of a hostile guest
//! need not be sorted; the search ends all the same, after at most 64 steps.

use std::cmp::Ordering;

/// The position of the element that `compare` finds equal, among `count` sorted ones. `compare`
/// reads the element at a position and says how it compares to the one that is searched for.
///
/// # Errors
/// Those of `compare`.
pub fn binary_search<E>(
    count: u64,
    mut compare: impl FnMut(u64) -> Result<Ordering, E>,
) -> Result<Option<u64>, E> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        match compare(middle)? {
            Ordering::Equal => return Ok(Some(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_there_and_nothing_else() {
        let array: Vec<u64> = (0..100).map(|at| 3 * at).collect();
        let find = |wanted: u64| {
            binary_search(100, |at| Ok::<_, ()>(array[at as usize].cmp(&wanted))).unwrap()
        };
        for (at, value) in (0..).zip(&array) {
            assert_eq!(find(*value), Some(at));
            assert_eq!(find(value + 1), None);
        }
    }

    #[test]
    fn an_unsorted_array_takes_no_more_steps() {
        for answer in [Ordering::Less, Ordering::Greater] {
            let mut steps = 0;
            let found = binary_search(u64::MAX, |_| {
                steps += 1;
                Ok::<_, ()>(answer)
            });
            assert_eq!(found, Ok(None));
            assert!(steps <= 64, "{steps}");
        }
    }

    #[test]
    fn a_failing_read_ends_the_search() {
        assert_eq!(binary_search(10, Err), Err(5));
    }
}
