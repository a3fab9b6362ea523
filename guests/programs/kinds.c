// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * kinds: creates one or more processes or threads of every kind that a livepatch transition has to
 * handle. Each is named after its kind. Those that the test patch `kinds` affects sleep in pause(2)
 * or vfork(2). Runs until it is killed; all of them are killed with it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/vhost.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FIFO "/tmp/kinds-fifo"

static void sleep_elsewhere(void)
{
	struct timespec long_time = { .tv_sec = 1000000 };

	for (;;)
		nanosleep(&long_time, NULL);
}

static void in_pause(void)
{
	for (;;)
		pause();
}

/* Sleeps in vfork(2), uninterruptibly, as long as the child lives, which sleeps in pause(2). */
static void in_vfork(void)
{
	if (vfork() == 0) {
		prctl(PR_SET_NAME, "k-vforked");
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	/* The child was killed. */
	sleep_elsewhere();
}

static void in_user_mode(void)
{
	for (volatile unsigned long turns = 0;; turns++)
		;
}

/* Makes system calls that take long and never sleep. */
static void in_kernel(void)
{
	size_t size = 64 << 20;
	char *to = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int zero = open("/dev/zero", O_RDONLY);

	if (to == MAP_FAILED || zero < 0)
		exit(1);
	for (;;)
		for (size_t done = 0; done < size; done += 1 << 20)
			if (read(zero, to, 1 << 20) != 1 << 20)
				exit(1);
}

static void stopped(void)
{
	for (;;)
		raise(SIGSTOP);
}

static void traced(void)
{
	pid_t child = fork();

	if (child == 0) {
		prctl(PR_SET_NAME, "k-traced");
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		stopped();
	}
	waitpid(child, NULL, 0);
	sleep_elsewhere();
}

static void with_zombie(void)
{
	if (fork() == 0) {
		prctl(PR_SET_NAME, "k-zombie");
		_exit(0);
	}
	sleep_elsewhere();
}

static void forking(void)
{
	for (;;) {
		if (fork() == 0)
			_exit(0);
		wait(NULL);
	}
}

static int clone_sleeps(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, "k-clone");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	in_pause();
	return 0;
}

/*
 * A process that shares everything with its parent but is no thread, and one that is init of new
 * namespaces.
 */
static void with_clones(void)
{
	size_t size = 64 << 10;
	char *stack = malloc(size);

	if (!stack || clone(clone_sleeps, stack + size, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_SYSVSEM | SIGCHLD, NULL) < 0)
		exit(1);
	if (unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS))
		exit(1);
	if (fork() == 0) {
		prctl(PR_SET_NAME, "k-namespace");
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		in_pause();
	}
	sleep_elsewhere();
}

/*
 * Opens a FIFO without a writer through io_uring: an io_uring worker of this process sleeps in
 * open.
 */
static void with_io_worker(void)
{
	struct io_uring_params params = { 0 };
	int ring = syscall(SYS_io_uring_setup, 4, &params);
	unsigned *tail, *array;
	struct io_uring_sqe *entry;
	char *queue;

	unlink(FIFO);
	if (ring < 0 || mkfifo(FIFO, 0600))
		exit(1);
	queue = mmap(NULL, params.sq_off.array + params.sq_entries * sizeof(unsigned), PROT_READ | PROT_WRITE,
		     MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
	entry = mmap(NULL, params.sq_entries * sizeof(*entry), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
		     IORING_OFF_SQES);
	if (queue == MAP_FAILED || entry == MAP_FAILED)
		exit(1);
	memset(entry, 0, sizeof(*entry));
	entry->opcode = IORING_OP_OPENAT;
	entry->flags = IOSQE_ASYNC;
	entry->fd = AT_FDCWD;
	entry->addr = (unsigned long)FIFO;
	entry->open_flags = O_RDONLY;
	tail = (unsigned *)(queue + params.sq_off.tail);
	array = (unsigned *)(queue + params.sq_off.array);
	array[0] = 0;
	__atomic_store_n(tail, 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring, 1, 0, 0, NULL, 0) != 1)
		exit(1);
	sleep_elsewhere();
}

/* Opens vhost-net without a network device: its worker waits for work. */
static void with_vhost_worker(void)
{
	int vhost = open("/dev/vhost-net", O_RDWR);

	if (vhost < 0 || ioctl(vhost, VHOST_SET_OWNER))
		exit(1);
	sleep_elsewhere();
}

static const struct {
	const char *name;
	int count;
	void (*run)(void);
} kinds[] = {
	{ "k-pause", 1, in_pause },
	{ "k-vfork", 1, in_vfork },
	{ "k-user", 4, in_user_mode },
	{ "k-kernel", 2, in_kernel },
	{ "k-stopped", 1, stopped },
	{ "k-tracer", 1, traced },
	{ "k-frozen", 1, in_pause },
	{ "k-parent", 1, with_zombie },
	{ "k-forking", 1, forking },
	{ "k-clones", 1, with_clones },
	{ "k-io", 1, with_io_worker },
	{ "k-vhost", 1, with_vhost_worker },
};

int main(void)
{
	for (size_t kind = 0; kind < sizeof(kinds) / sizeof(kinds[0]); kind++) {
		for (int i = 0; i < kinds[kind].count; i++) {
			pid_t pid = fork();

			if (pid < 0)
				return 1;
			if (pid == 0) {
				prctl(PR_SET_NAME, kinds[kind].name);
				prctl(PR_SET_PDEATHSIG, SIGKILL);
				kinds[kind].run();
			}
		}
	}
	for (;;)
		if (wait(NULL) < 0)
			sleep_elsewhere();
}
