//! A guest that has started another kernel with fewer CPUs (kexec, a crash kernel): the kernel in
//! use is the one that a vCPU runs, and not the one in which others are halted.

use introspect::task_list;
use introspect::{FindError, Kernel, NotReady, VcpuRegs};

use hostile_guest::image::{self, SECOND, SECOND_RELEASE, task_at, vcpus_of_two_kernels};
use hostile_guest::mutate::Mutated;
use hostile_guest::{kernel, ram};

fn release(memory: &[u8], vcpus: &[VcpuRegs]) -> Result<String, FindError> {
    Kernel::find(&Mutated::of(memory), vcpus).map(|kernel| kernel.release)
}

#[test]
fn the_kernel_that_a_vcpu_runs_is_found_and_is_the_one_in_use() {
    let ram = image::two_kernels();
    let memory = Mutated::of(ram.as_slice());
    let vcpus = vcpus_of_two_kernels();
    let reversed: Vec<_> = vcpus.iter().rev().cloned().collect();
    for vcpus in [&vcpus, &reversed] {
        let second = Kernel::find(&memory, vcpus).unwrap();
        assert_eq!(second.release, SECOND_RELEASE);
        let own = second.memory(&memory);
        assert!(second.is_running(&own, vcpus));
        assert_eq!(second.parked_vcpus(&own, vcpus), [0]);

        // The first kernel lies unchanged in memory, and is not in use.
        let first = kernel();
        assert!(!first.is_running(&first.memory(&memory), vcpus));
        assert!(first.is_running(&first.memory(&memory), &vcpus[..0]));

        // The halted vCPU has the GS base of CPU 0 and is on the stack of its task, in both
        // kernels: it runs no task of the second one.
        let tasks = task_list::read(&second, &own, vcpus).unwrap();
        let running: Vec<_> = tasks.iter().filter(|task| task.vcpu.is_some()).collect();
        let [task] = running.as_slice() else {
            panic!("{running:?}");
        };
        assert_eq!((task.vcpu, task.pid), (Some(1), 0));
        // Nor does it run the idle task of the CPU that was never started.
        assert!(!tasks.last().unwrap().on_cpu);
    }
}

#[test]
fn a_vcpu_that_is_not_halted_permanently_in_another_kernel_refuses_both() {
    let ram = image::two_kernels();
    let memory = Mutated::of(ram.as_slice());
    let interruptible = |vcpu: &mut VcpuRegs| vcpu.rflags = 1 << 9;
    let not_at_hlt = |vcpu: &mut VcpuRegs| vcpu.rip += 8;
    let in_user_mode = |vcpu: &mut VcpuRegs| vcpu.cpl = 3;
    let changes: [&dyn Fn(&mut VcpuRegs); 3] = [&interruptible, &not_at_hlt, &in_user_mode];
    for change in changes {
        let mut vcpus = vcpus_of_two_kernels();
        let second = Kernel::find(&memory, &vcpus).unwrap();
        change(&mut vcpus[0]);
        let own = second.memory(&memory);
        assert!(!second.is_running(&own, &vcpus), "{:?}", vcpus[0]);
        assert!(second.parked_vcpus(&own, &vcpus).is_empty());
        let first = kernel();
        assert!(!first.is_running(&first.memory(&memory), &vcpus));
    }
    // What the registers say counts more than the code, which the new kernel may have overwritten.
    let mut vcpus = vcpus_of_two_kernels();
    not_at_hlt(&mut vcpus[0]);
    vcpus[0].halted = true;
    let second = Kernel::find(&memory, &vcpus).unwrap();
    assert!(second.is_running(&second.memory(&memory), &vcpus));
}

#[test]
fn while_the_new_kernel_boots_the_old_one_is_not_found() {
    let mut ram = image::two_kernels();
    let vcpus = vcpus_of_two_kernels();
    let state = SECOND + image::IMAGE + image::DATA + 0x10;
    ram[state] = 1;
    let booting = release(&ram, &vcpus);
    assert_eq!(booting, Err(FindError::NotReady(NotReady::Booting(1))));
    // Before that it has no page tables.
    let mut vcpus = vcpus;
    vcpus[1].cr0 = 0;
    let no_image = release(&ram, &vcpus);
    assert_eq!(no_image, Err(FindError::NotReady(NotReady::NoImage)));
}

/// Also a kernel that was halted with interrupts off can be read, as by `halt -f`.
#[test]
fn a_guest_in_which_every_vcpu_is_halted_is_found() {
    let mut vcpus = image::vcpus();
    vcpus[0].halted = true;
    let kernel = Kernel::find(&Mutated::of(ram()), &vcpus).unwrap();
    let memory = Mutated::of(ram());
    let own = kernel.memory(&memory);
    assert!(kernel.is_running(&own, &vcpus));
    assert!(kernel.parked_vcpus(&own, &vcpus).is_empty());
    let tasks = task_list::read(&kernel, &own, &vcpus).unwrap();
    let running = tasks.iter().find(|task| task.vcpu == Some(0)).unwrap();
    assert_eq!(running.addr.0, image::virt(task_at(0)));
}
