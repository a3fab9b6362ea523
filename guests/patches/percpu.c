// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch with per-CPU data of its own, in which it counts its calls.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/seq_file.h>

static DEFINE_PER_CPU(unsigned long, calls) = 100;

static int patched_show(struct seq_file *m, void *v)
{
	unsigned long sum = 0;
	int cpu;

	this_cpu_inc(calls);
	for_each_possible_cpu(cpu)
		sum += per_cpu(calls, cpu) - 100;
	seq_printf(m, "calls: %lu\n", sum);
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = patched_show },
	{ }
};

static struct klp_object objs[] = {
	{ .funcs = funcs },
	{ }
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs };

static int __init patch_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit patch_exit(void)
{
}

module_init(patch_init);
module_exit(patch_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("outpatch test patch: percpu");
MODULE_INFO(livepatch, "Y");
