// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch of the main loop of a kernel thread, which never returns: no transition to it
 * completes unless it is forced.
 */
#include <linux/livepatch.h>
#include <linux/module.h>

static int patched_oom_reaper(void *unused)
{
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "oom_reaper", .new_func = patched_oom_reaper },
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
MODULE_DESCRIPTION("outpatch test patch: kthread");
MODULE_INFO(livepatch, "Y");
