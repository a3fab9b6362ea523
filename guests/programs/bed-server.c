// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Preloaded into the bed's file server, virtiofsd, which is written for root: lets any user run it,
 * without a user namespace, and root in a container that has fewer capabilities or a system call
 * filter. The bed gets no more of the host's files than the user may read and write.
 *
 * Each function does what was requested. Where the host does not permit that, and the server of the
 * whole tree works without it, the function reports success.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <stdarg.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int capng_apply(int set);
int seccomp_load(void *filter);

static int is_forbidden(int error)
{
	return error == EPERM || error == ENOSYS || error == EINVAL;
}

/* In the user's own groups, the server can do what the user can. */
int setgroups(size_t size, const gid_t *list)
{
	int result = NEXT(setgroups)(size, list);

	return result < 0 && is_forbidden(errno) ? 0 : result;
}

/* The source is "/", where the server is already. */
int chroot(const char *path)
{
	int result = NEXT(chroot)(path);

	return result < 0 && is_forbidden(errno) && !strcmp(path, "/") ? 0 : result;
}

/* A thread's own current folder is for extended attributes, which the bed does not use. */
int unshare(int flags)
{
	int result = NEXT(unshare)(flags);

	return result < 0 && is_forbidden(errno) && flags == CLONE_FS ? 0 : result;
}

/* Fails where the server would add capabilities that it does not have. */
int capng_apply(int set)
{
	NEXT(capng_apply)(set);
	return 0;
}

/*
 * The server's filter kills it when it, or a library that takes another path because something is
 * not permitted, makes a system call that is not on its list. What is served is the user's own.
 */
int seccomp_load(void *filter)
{
	(void)filter;
	return 0;
}

/* The server becomes root for what root does in the bed. Files that it makes are the user's. */
long syscall(long number, ...)
{
	long a[6], result;
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	result = NEXT(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (result < 0 && is_forbidden(errno) && (number == SYS_setresuid || number == SYS_setresgid))
		return 0;
	return result;
}

/* The server would keep the caller's limit if it may not raise it to what it wishes. */
int setrlimit64(__rlimit_resource_t resource, const struct rlimit64 *limit)
{
	int result = NEXT(setrlimit64)(resource, limit);
	struct rlimit64 own;

	if (!result || errno != EPERM || getrlimit64(resource, &own))
		return result;
	own.rlim_cur = own.rlim_max;
	return NEXT(setrlimit64)(resource, &own);
}

/* The bed's overlay over /tmp opens files with O_NOATIME, which only their owners may. */
int openat64(int folder, const char *path, int flags, ...)
{
	mode_t mode;
	va_list list;
	int result;

	va_start(list, flags);
	mode = va_arg(list, mode_t);
	va_end(list);
	result = NEXT(openat64)(folder, path, flags, mode);
	if (result < 0 && errno == EPERM && flags & O_NOATIME)
		result = NEXT(openat64)(folder, path, flags & ~O_NOATIME, mode);
	return result;
}

int __openat64_2(int folder, const char *path, int flags)
{
	return openat64(folder, path, flags, 0);
}
