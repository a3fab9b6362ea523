# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Times drgn on a core: prints JSON with seconds of CPU time for listing all tasks and for the stacks of a sample of them."""

import json
import sys
import time

import drgn
from drgn.helpers.linux.pid import for_each_task

vmlinux, core, sample = sys.argv[1], sys.argv[2], int(sys.argv[3])
prog = drgn.Program()
prog.set_core_dump(core)
prog.load_debug_info([vmlinux])

RUNS = 5


def median(times):
    return sorted(times)[len(times) // 2]


def listing():
    start = time.process_time()
    found = [(task.pid.value_(), task.comm.string_()) for task in for_each_task(prog)]
    return time.process_time() - start, len(found)


listings = [listing() for _ in range(RUNS)]
# Running tasks have no saved frame, and their registers may be in no note that drgn reads.
asleep = [task for task in for_each_task(prog) if not task.on_cpu.value_()]
# Some stacks drgn follows through user mode, for a thousand frames of nothing: those are left out, in its favour. Going through
# them reads its unwind data, too, which it does once.
LONGEST = 64
chosen = []
for task in asleep:
    if len(chosen) < sample and len(prog.stack_trace(task)) <= LONGEST:
        chosen.append(task)


def unwinding():
    start = time.process_time()
    frames = sum(len(prog.stack_trace(task)) for task in chosen)
    return time.process_time() - start, frames


stacks = [unwinding() for _ in range(RUNS)]
print(
    json.dumps(
        {
            "version": getattr(drgn, "__version__", "of unknown version"),
            "tasks": listings[0][1],
            "list": median([time for time, _ in listings]),
            "stacks": len(chosen),
            "frames": stacks[0][1],
            "unwind": median([time for time, _ in stacks]),
        }
    )
)
