// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch of uname(2): it writes to user memory, so its STAC and CLAC must be patched in and
 * its faults fixed up. guests/programs/hammer.c knows the new result.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/utsname.h>
#include <asm/ptrace.h>

#define NEW_SYSNAME "outpatch"

static long patched_newuname(const struct pt_regs *regs)
{
	struct new_utsname name = *utsname();

	strscpy(name.sysname, NEW_SYSNAME, sizeof(name.sysname));
	if (copy_to_user((void __user *)regs->di, &name, sizeof(name)))
		return -EFAULT;
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "__x64_sys_newuname", .new_func = patched_newuname },
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
MODULE_DESCRIPTION("outpatch test patch: uname");
MODULE_INFO(livepatch, "Y");
