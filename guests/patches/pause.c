// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch of pause(2), in which tasks sleep indefinitely: they block the transition until
 * something wakes them. The new function sleeps for a tenth of a second at a time.
 */
#include <linux/errno.h>
#include <linux/jiffies.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>

static long patched_pause(const struct pt_regs *regs)
{
	schedule_timeout_interruptible(HZ / 10);
	return -EAGAIN;
}

static struct klp_func funcs[] = {
	{ .old_name = "__do_sys_pause", .new_func = patched_pause },
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
MODULE_DESCRIPTION("outpatch test patch: pause");
MODULE_INFO(livepatch, "Y");
