// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch with an obstacle of every kind: each is to be named, with the function that it is of.
 */
#include <linux/bug.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/seq_file.h>

static DEFINE_PER_CPU(int, calls);
static int prepared;

extern void outpatch_no_such_export(void);

static int new_cmdline_proc_show(struct seq_file *m, void *v)
{
	WARN_ON_ONCE(!m);
	this_cpu_inc(calls);
	seq_printf(m, "%s\n", module_name(THIS_MODULE));
	outpatch_no_such_export();
	return 0;
}

static int new_missing(struct seq_file *m, void *v)
{
	return prepared;
}

static struct klp_func funcs[] = {
	{
		.old_name = "cmdline_proc_show",
		.new_func = new_cmdline_proc_show,
	},
	{
		.old_name = "outpatch_no_such_function",
		.new_func = new_missing,
	},
	{ }
};

static int pre_patch(struct klp_object *obj)
{
	return 0;
}

static struct klp_object objs[] = {
	{
		.funcs = funcs,
		.callbacks = { .pre_patch = pre_patch },
	},
	{ }
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs };

static int __init obstacles_init(void)
{
	int error = klp_enable_patch(&patch);

	prepared = 1;
	return error;
}

static void __exit obstacles_exit(void)
{
	pr_info("obstacles: gone\n");
}

module_init(obstacles_init);
module_exit(obstacles_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("outpatch test patch: obstacles");
MODULE_INFO(livepatch, "Y");
