// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch that gives the kernel the address of one of its functions: each read of
 * /proc/cmdline queues an RCU callback, which runs after a grace period, also when the patch was
 * reverted in between.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

struct object {
	struct rcu_head rcu;
};

static void release(struct rcu_head *head)
{
	kfree(container_of(head, struct object, rcu));
}

static int patched_show(struct seq_file *m, void *v)
{
	struct object *object = kzalloc(sizeof(*object), GFP_KERNEL);

	if (!object)
		return -ENOMEM;
	call_rcu(&object->rcu, release);
	seq_puts(m, "freed after a grace period\n");
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
MODULE_DESCRIPTION("outpatch test patch: rcu-callback");
MODULE_INFO(livepatch, "Y");
