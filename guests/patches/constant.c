// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch that copies a constant to user space: hardened usercopy kills the caller if the
 * constant is where the kernel takes it for its own text.
 */
#include <linux/fs.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/uaccess.h>

static const char text[] = "a constant of the patch\n";

static ssize_t patched_read(struct file *file, char __user *buf, size_t count, loff_t *ppos)
{
	return simple_read_from_buffer(buf, count, ppos, text, sizeof(text) - 1);
}

static struct klp_func funcs[] = {
	{ .old_name = "oom_score_adj_read", .new_func = patched_read },
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
MODULE_DESCRIPTION("outpatch test patch: constant");
MODULE_INFO(livepatch, "Y");
