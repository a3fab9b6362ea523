/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The livepatch structures that the author of a patch fills in, for a kernel without
 * CONFIG_LIVEPATCH, whose own header does not declare them. With this header included before the
 * patch's source, the module can be built; outpatch accepts it, insmod does not.
 */
#ifndef KLP_PUBLIC_H
#define KLP_PUBLIC_H

#include <linux/types.h>

struct module;
struct klp_object;
struct klp_state;

struct klp_callbacks {
	int (*pre_patch)(struct klp_object *obj);
	void (*post_patch)(struct klp_object *obj);
	void (*pre_unpatch)(struct klp_object *obj);
	void (*post_unpatch)(struct klp_object *obj);
};

struct klp_func {
	const char *old_name;
	void *new_func;
	unsigned long old_sympos;
};

struct klp_object {
	const char *name;
	struct klp_func *funcs;
	struct klp_callbacks callbacks;
};

struct klp_patch {
	struct module *mod;
	struct klp_object *objs;
	struct klp_state *states;
	bool replace;
};

int klp_enable_patch(struct klp_patch *patch);

#endif
