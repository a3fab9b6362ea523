// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch whose timers expire some seconds after each read of /proc/cmdline, also when the
 * patch was reverted in between: one in its own data, and one in memory of the kernel's that calls
 * a function of the patch.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/timer.h>

#define DELAY (8 * HZ)

static unsigned long expired;

static void own_expired(struct timer_list *timer)
{
	expired = jiffies;
	pr_info("timer in the patch's data expired\n");
}

static DEFINE_TIMER(own, own_expired);

static void allocated_expired(struct timer_list *timer)
{
	pr_info("timer in allocated memory expired\n");
	kfree(timer);
}

static int patched_show(struct seq_file *m, void *v)
{
	struct timer_list *allocated = kzalloc(sizeof(*allocated), GFP_KERNEL);

	if (!allocated)
		return -ENOMEM;
	timer_setup(allocated, allocated_expired, 0);
	mod_timer(allocated, jiffies + DELAY);
	mod_timer(&own, jiffies + DELAY);
	seq_puts(m, "timers started\n");
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = patched_show },
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
MODULE_DESCRIPTION("outpatch test patch: timer");
MODULE_INFO(livepatch, "Y");
