//! Reports what inputs of a fuzz target cost: `cargo run --release --example replay -- TARGET
//! FILE...` prints the slowest and the largest.

use std::time::Duration;

use hostile_guest::{TARGETS, allocations, cpu_time, prepare};

fn main() {
    let mut words = std::env::args().skip(1);
    let name = words.next().expect("which target?");
    let known = TARGETS.iter().find(|(target, _)| *target == name);
    let (_, run) = known.expect("a target of TARGETS");
    prepare();
    let (mut slowest, mut largest) = ((Duration::ZERO, String::new()), (0, String::new()));
    let mut count = 0;
    for path in words {
        let bytes = std::fs::read(&path).expect("an input");
        let start = cpu_time();
        let (_, held) = allocations::measured(|| run(&bytes));
        slowest = slowest.max((cpu_time() - start, path.clone()));
        largest = largest.max((held, path));
        count += 1;
    }
    println!("{count} inputs of {name}");
    println!("slowest: {:?} {}", slowest.0, slowest.1);
    println!("largest: {} bytes {}", largest.0, largest.1);
}
