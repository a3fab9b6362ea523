# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Return addresses that kretprobes and the function graph tracer have replaced, which drgn does not
recover. They are searched as the kernel does (arch/x86/kernel/unwind_orc.c:
unwind_recover_ret_addr), with the kernel's debugging information.
"""
from drgn import TypeKind, cast
from drgn.helpers.linux.list import hlist_for_each_entry
from drgn.helpers.linux.llist import llist_for_each_entry

TRAMPOLINES = {
    "return_to_handler": "graph",
    "arch_rethook_trampoline": "hooks",
    "kretprobe_trampoline": "hooks",
    "__kretprobe_trampoline": "hooks",
}
# kernel/trace/fgraph.c: FGRAPH_FRAME_OFFSET_MASK
FRAME_OFFSET_MASK = (1 << 10) - 1


class Records:
    """What the tracers have recorded for a task: (place on the stack, address) of each, the latest
    first."""

    def __init__(self, prog, task):
        self.prog = prog
        self.task = task
        self.trampolines = trampolines(prog)
        self.lists = {}

    def search(self, kind, retp):
        """The latest record of this place that was not used yet."""
        if kind not in self.lists:
            find = {"graph": graph, "hooks": hooks}[kind]
            self.lists[kind] = list(find(self.prog, self.task))
        for n, (at, ret) in enumerate(self.lists[kind]):
            if at == retp:
                del self.lists[kind][n]
                return ret
        return None


def trampolines(prog):
    found = {}
    for name, kind in TRAMPOLINES.items():
        try:
            found[prog.symbol(name).address] = kind
        except LookupError:
            pass  # not in this kernel
    return found


def graph(prog, task):
    stack = task.ret_stack
    used = task.curr_ret_stack.value_()
    if not stack:
        return
    if stack.type_.type.kind == TypeKind.STRUCT:
        for n in range(used, -1, -1):
            yield stack[n].retp.value_(), stack[n].ret.value_()
        return
    while used > 0:
        used -= 1
        used -= stack[used].value_() & FRAME_OFFSET_MASK
        entry = cast("struct ftrace_ret_stack *", stack + used)
        yield entry.retp.value_(), entry.ret.value_()


def hooks(prog, task):
    try:
        table = prog["kretprobe_inst_table"]
    except KeyError:
        table = None
    if table is not None:
        for bucket in table:
            head = bucket.address_of_()
            for one in hlist_for_each_entry("struct kretprobe_instance", head, "hlist"):
                if one.task == task:
                    yield one.fp.value_(), one.ret_addr.value_()
    elif hasattr(task, "rethooks"):
        node = task.rethooks.first
        for one in llist_for_each_entry("struct rethook_node", node, "llist"):
            yield one.frame.value_(), one.ret_addr.value_()
    else:
        node = task.kretprobe_instances.first
        for one in llist_for_each_entry("struct kretprobe_instance", node, "llist"):
            yield one.fp.value_(), one.ret_addr.value_()


def records(prog, task):
    """The records of a task, for `recover`."""
    return Records(prog, task)


def recover(records, pc, retp):
    """The address that was replaced by `pc` at this place on the stack, which is not one of a
    trampoline; None if `pc` is no trampoline, or no such address was recorded."""
    if pc not in records.trampolines:
        return None
    while pc in records.trampolines:
        pc = records.search(records.trampolines[pc], retp)
    return pc
