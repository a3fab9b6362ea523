// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch of the main loop of vhost's workers since Linux 6.4 (earlier, they are kernel threads
 * with another main loop): as long as one of them exists, no transition to it completes unless it
 * is forced.
 */
#include <linux/livepatch.h>
#include <linux/module.h>

static int patched_vhost_task(void *unused)
{
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "vhost_task_fn", .new_func = patched_vhost_task },
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
MODULE_DESCRIPTION("outpatch test patch: worker");
MODULE_INFO(livepatch, "Y");
