// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch of two functions at once: a task must never see one original and one new function.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/string.h>

#define NEW_PID_OFFSET 1000000

static int patched_show(struct seq_file *m, void *v)
{
	seq_puts(m, "both are new\n");
	return 0;
}

static long patched_getpid(const struct pt_regs *regs)
{
	pid_t pid = task_tgid_vnr(current);

	/* Only for tasks that expect it: a shell, for example, cannot work with a wrong PID. */
	return strcmp(current->comm, "hammering") ? pid : pid + NEW_PID_OFFSET;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = patched_show },
	{ .old_name = "__do_sys_getpid", .new_func = patched_getpid },
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
MODULE_DESCRIPTION("outpatch test patch: two-functions");
MODULE_INFO(livepatch, "Y");
