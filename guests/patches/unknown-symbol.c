// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: it calls a function that no kernel exports.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

extern int outpatch_no_such_export(struct seq_file *m);

static int patched_show(struct seq_file *m, void *v)
{
	return outpatch_no_such_export(m);
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
MODULE_DESCRIPTION("outpatch test patch: unknown-symbol");
MODULE_INFO(livepatch, "Y");
