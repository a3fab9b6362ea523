// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch whose init function sets a value before it enables the patch. outpatch does not run
 * init functions, so it must refuse this module.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

static int limit;

static int patched_show(struct seq_file *m, void *v)
{
	seq_printf(m, "limit=%d\n", limit);
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
	limit = 4242;
	return klp_enable_patch(&patch);
}

static void __exit patch_exit(void)
{
}

module_init(patch_init);
module_exit(patch_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("outpatch test patch: init-value");
MODULE_INFO(livepatch, "Y");
