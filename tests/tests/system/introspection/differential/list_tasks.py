# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Lists the tasks of core files with drgn.

For each path on standard input it prints one line of JSON: `{"tasks": {ADDRESS: TASK}}` or
`{"error": TEXT}`. A TASK has `pid`, `comm`, `listed` (false: on a CPU, but in no list any more) and
`frames`: the addresses on its kernel stack, innermost first, without inlined functions and without
user mode; or null, with the reason in `why`. `recovered` is the number of return addresses on it
that a tracer had replaced.

usage: list_tasks.py VMLINUX
"""
import json
import sys

import drgn
from drgn.helpers.linux.cpumask import for_each_online_cpu, for_each_possible_cpu
from drgn.helpers.linux.percpu import per_cpu, per_cpu_ptr
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import cpu_curr

import replaced_addresses

KERNEL_HALF = 1 << 63


def idle_tasks(prog):
    """The idle tasks, which are in no list."""
    for cpu in for_each_possible_cpu(prog):
        idle = per_cpu_ptr(prog["idle_threads"].address_of_(), cpu)[0]
        if idle:
            yield idle


def current_tasks(prog):
    """The CPUs' current tasks, by the run queue and by the CPU: they differ in a context switch."""
    for cpu in for_each_online_cpu(prog):
        yield cpu_curr(prog, cpu)
        try:
            current = per_cpu(prog["pcpu_hot"], cpu).current_task
        except KeyError:
            current = per_cpu(prog["current_task"], cpu)
        yield current.read_()


def kernel_frames(prog, task, recovered):
    # A dead task has freed its stack: the memory has another use, or stale content
    # (kernel/fork.c: put_task_stack).
    if not task.stack_refcount.refs.counter:
        return []
    records = replaced_addresses.records(prog, task)
    frames = []
    trace, beyond = prog.stack_trace(task), 0
    while trace is not None:
        trace = add_frames(prog, trace, beyond, records, frames, recovered)
        beyond = 1
    return frames


def add_frames(prog, trace, beyond, records, frames, recovered):
    """Adds the frames of a trace, of which the first one is at an address `beyond` that of drgn.
    Where drgn cannot go on, as a tracer has replaced the return address, it returns the trace from
    the true address on. That is a return address, so the call before it tells how to go on: it can
    be the function's last instruction. For drgn a first frame is at no call, so it gets the address
    before."""
    for frame in trace:
        if frame.is_inline:
            continue
        if frame.pc < KERNEL_HALF:
            break
        ret = replaced_addresses.recover(records, frame.pc, frame.sp - 8)
        if ret is not None:
            recovered.append(ret)
            regs = {"ip": ret - 1, "sp": frame.sp, "bp": frame.register("rbp"), "cs": 0x10}
            return prog.stack_trace(drgn.Object(prog, "struct pt_regs", regs))
        frames.append(frame.pc + beyond)
        beyond = 0
    return None


def describe(prog, task, listed):
    described = {
        "pid": task.pid.value_(),
        "comm": task.comm.string_().decode(errors="replace"),
        "listed": listed,
        "frames": None,
        "recovered": 0,
    }
    recovered = []
    try:
        described["frames"] = kernel_frames(prog, task, recovered)
        described["recovered"] = len(recovered)
    except (ValueError, LookupError, drgn.FaultError) as error:
        described["why"] = str(error)
    return described


def tasks(core, vmlinux):
    prog = drgn.Program()
    prog.set_core_dump(core)
    prog.load_debug_info([vmlinux])
    described = {}
    for listed, group in (
        (True, for_each_task(prog)),
        (True, idle_tasks(prog)),
        (False, current_tasks(prog)),
    ):
        for task in group:
            if task.value_() not in described:
                described[task.value_()] = describe(prog, task, listed)
    return described


def main():
    (vmlinux,) = sys.argv[1:]
    for line in sys.stdin:
        try:
            answer = {"tasks": tasks(line.rstrip("\n"), vmlinux)}
        except Exception as error:  # reported, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


main()
