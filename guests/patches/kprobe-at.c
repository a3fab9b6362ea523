// SPDX-License-Identifier: GPL-2.0-only
/*
 * An ordinary module for guests: a kprobe at the address that it is given, which counts its hits.
 */
#include <linux/atomic.h>
#include <linux/kprobes.h>
#include <linux/module.h>

static unsigned long address;
module_param(address, ulong, 0400);

static atomic_t hits;

static int hit(struct kprobe *probe, struct pt_regs *regs)
{
	atomic_inc(&hits);
	return 0;
}

static struct kprobe probe = { .pre_handler = hit };

static int __init kprobe_at_init(void)
{
	probe.addr = (kprobe_opcode_t *)address;
	return register_kprobe(&probe);
}

static void __exit kprobe_at_exit(void)
{
	unregister_kprobe(&probe);
	pr_info("kprobe_at: %d hits\n", atomic_read(&hits));
}

module_init(kprobe_at_init);
module_exit(kprobe_at_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A kprobe at an address");
