// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch with callbacks, which the kernel runs before and after the transition, in process
 * context.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

static int prepared;

static int before_patch(struct klp_object *obj)
{
	prepared = 1;
	return 0;
}

static void after_unpatch(struct klp_object *obj)
{
	prepared = 0;
}

static int patched_show(struct seq_file *m, void *v)
{
	seq_printf(m, "prepared: %d\n", prepared);
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = patched_show },
	{ }
};

static struct klp_object objs[] = {
	{ .callbacks = { .pre_patch = before_patch, .post_unpatch = after_unpatch }, .funcs = funcs },
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
MODULE_DESCRIPTION("outpatch test patch: callbacks");
MODULE_INFO(livepatch, "Y");
