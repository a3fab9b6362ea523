// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch of uname(2) that uses most features that a module can have. The result shows what
 * works:
 *   sysname: "features"
 *   nodename: the number of calls so far, from .bss
 *   release: the entries of a table of pointers in .data.rel.ro, in turn
 *   version: "init_on_alloc=N", the present state of a static key of the kernel
 *   domainname: a static key of the module itself
 * The caller's buffer has a command: "W" makes it warn once, "F" makes it read and write a bad user
 * address.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/atomic.h>
#include <linux/jump_label.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/utsname.h>
#include <asm/ptrace.h>

static atomic_t calls;
static int first_number = 42;
static const char *const words[] = { "zero", "one", "two", "three" };
static const unsigned char weights[] = { 3, 1, 4, 1, 5, 9, 2, 6 };
static DEFINE_STATIC_KEY_TRUE(own_true);
static DEFINE_STATIC_KEY_FALSE(own_false);

static noinline int weigh(const char *text)
{
	int sum = first_number;

	for (; *text; text++)
		sum += weights[*text & 7];
	return sum;
}

static noinline int fault(void)
{
	int __user *bad = (int __user *)8;
	int value;

	if (!get_user(value, bad))
		return 1;
	if (!put_user(1, bad))
		return 2;
	return 0;
}

static long patched_newuname(const struct pt_regs *regs)
{
	void __user *buffer = (void __user *)regs->di;
	struct new_utsname name = *utsname();
	int number = atomic_inc_return(&calls);
	int bad = 0;
	char command;

	if (get_user(command, (char __user *)buffer))
		return -EFAULT;
	if (command == 'W')
		WARN(1, "outpatch: a warning that was asked for\n");
	if (command == 'F')
		bad = fault();
	cond_resched();
	strscpy(name.sysname, "features", sizeof(name.sysname));
	snprintf(name.nodename, sizeof(name.nodename), "%d", number);
	strscpy(name.release, words[number & 3], sizeof(name.release));
	snprintf(name.version, sizeof(name.version), "init_on_alloc=%d", want_init_on_alloc(0));
	snprintf(name.domainname, sizeof(name.domainname), "%d%d %d %d", static_branch_likely(&own_true) ? 1 : 0,
		 static_branch_unlikely(&own_false) ? 1 : 0, bad, weigh(name.sysname));
	return copy_to_user(buffer, &name, sizeof(name)) ? -EFAULT : 0;
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
MODULE_DESCRIPTION("outpatch test patch: features");
MODULE_INFO(livepatch, "Y");
