// SPDX-License-Identifier: GPL-2.0-only
/*
 * An ordinary module: once it is loaded, the kernel panics when the next task is taken off the task
 * lists, with tasklist_lock held for writing (kernel/exit.c: __unhash_process).
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/panic.h>

static int die(struct kprobe *probe, struct pt_regs *regs)
{
	panic("with tasklist_lock held");
	return 0;
}

static struct kprobe probe = {
	.symbol_name = "detach_pid",
	.pre_handler = die,
};

static int __init die_init(void)
{
	return register_kprobe(&probe);
}

module_init(die_init);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Panics with tasklist_lock held");
