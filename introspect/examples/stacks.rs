//! Prints every kernel stack in a core file:
//! `cargo run --example stacks -p introspect -- guest.core`.

use std::error::Error;
use std::path::Path;

use introspect::{CoreFile, Kernel, Unwinder, Verdict, task_list};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("which core file?")?;
    let core = CoreFile::open(Path::new(&path))?;
    let kernel = Kernel::find(&core, core.vcpus())?;
    let memory = kernel.memory(&core);
    let mut unwinder = Unwinder::new(&kernel, &memory)?;
    unwinder.refresh(&kernel, &memory)?;
    println!("{}", kernel.banner);

    let tasks = task_list::read(&kernel, &memory, core.vcpus())?;
    let each: Vec<_> = tasks.iter().collect();
    let stacks = unwinder.stacks(&memory, &each, core.vcpus());
    for (task, stack) in tasks.iter().zip(stacks) {
        println!("\n{} {} {}", task.pid, task.state_letter(), task.comm);
        for frame in &stack.frames {
            // A return address belongs to the call before it, which may be its function's last.
            let back = u64::from(!frame.exact);
            match kernel.symbolize(frame.ip.sub(back)) {
                Some((symbol, offset)) => println!("  {}+{:#x}", symbol.name, offset + back),
                None => println!("  {}", frame.ip),
            }
        }
        if let Verdict::Unreliable(reason) = stack.verdict {
            println!("  unreliable: {reason}");
        }
    }
    Ok(())
}
