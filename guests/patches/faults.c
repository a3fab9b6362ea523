// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch that needs the guest's kernel to know its code: it reads from a user address at which
 * nothing is mapped, warns, and copies its own module's name (/proc/loadavg); and it sleeps
 * (/proc/version).
 */
#include <linux/jiffies.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/string.h>
#include <linux/uaccess.h>

/* Nothing is mapped there: it is below vm.mmap_min_addr. */
#define BAD_ADDRESS ((const int __user *)16)

static noinline int read_user(const int __user *from, int *value)
{
	if (!user_access_begin(from, sizeof(*from)))
		return -EACCES;
	unsafe_get_user(*value, from, fault);
	user_access_end();
	return 0;
fault:
	user_access_end();
	return -EFAULT;
}

static noinline int faults_show(struct seq_file *m, void *v)
{
	char name[MODULE_NAME_LEN];
	int value = 0;
	int error = read_user(BAD_ADDRESS, &value);

	strscpy(name, THIS_MODULE->name, sizeof(name));
	WARN_ON_ONCE(error == -EFAULT);
	seq_printf(m, "%s: error %d\n", name, error);
	return 0;
}

static noinline int sleeps_show(struct seq_file *m, void *v)
{
	schedule_timeout_interruptible(600 * HZ);
	seq_puts(m, "slept\n");
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "loadavg_proc_show", .new_func = faults_show },
	{ .old_name = "version_proc_show", .new_func = sleeps_show },
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
MODULE_DESCRIPTION("outpatch test patch: faults");
MODULE_INFO(livepatch, "Y");
