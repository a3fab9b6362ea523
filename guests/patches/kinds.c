// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch of pause(2) and vfork(2), in which the tasks of the program `kinds` sleep,
 * interruptibly and uninterruptibly. The new pause sleeps for two seconds at a time, as hundreds of
 * tasks call it repeatedly; the new vfork fails with EAGAIN.
 */
#include <linux/errno.h>
#include <linux/jiffies.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>

static long patched_pause(const struct pt_regs *regs)
{
	schedule_timeout_interruptible(2 * HZ);
	return -EAGAIN;
}

static long patched_vfork(const struct pt_regs *regs)
{
	return -EAGAIN;
}

static struct klp_func funcs[] = {
	{ .old_name = "__do_sys_pause", .new_func = patched_pause },
	{ .old_name = "__do_sys_vfork", .new_func = patched_vfork },
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
MODULE_DESCRIPTION("outpatch test patch: kinds");
MODULE_INFO(livepatch, "Y");
