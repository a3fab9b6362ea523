//! Stock kernels booted, patched and checked under a real KVM: the host's own where it works, else
//! a nested test bed.
//!
//! Each scenario runs in a bed of its own, in a process of its own: this binary, started a second
//! time inside. A guest that is lost before outpatch first touched it is a failure of the bed: it
//! is reported and counted, and the boot is tried once more. A guest that is lost later fails its
//! scenario. A bed that is lost, with all guests in it, is treated like a guest that does not boot:
//! it is reported and counted, and the scenario is tried once more.

mod harness;
mod introspection;
mod patching;
mod vmm;

use std::env;
use std::path::Path;
use std::process::ExitCode;

use crate::harness::run;
use crate::patching::fault_injection::live;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.as_slice() {
        [flag, name, file] if flag == run::INSIDE => run::inside(name, Path::new(file)),
        [verb, options @ ..] if verb == live::RUN => live::run(options),
        _ => run::on_host(),
    }
}
