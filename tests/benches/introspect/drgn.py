# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Times drgn on a core file.

Prints JSON with the seconds of CPU time for listing all tasks and for the stacks of a sample.
"""

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
# Running tasks have no saved frame, and drgn may not read the note with their registers.
asleep = [task for task in for_each_task(prog) if not task.on_cpu.value_()]
# drgn unwinds some stacks through user mode, with a thousand meaningless frames: those are left
# out, in its favour. Unwinding all of them here also makes drgn read its unwind data, once.
MAX_FRAMES = 64
chosen = []
for task in asleep:
    if len(chosen) < sample and len(prog.stack_trace(task)) <= MAX_FRAMES:
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
