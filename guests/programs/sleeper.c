// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * sleeper [N]: N processes (default 8) that sleep in the kernel until they are killed, each in one of
 * the ways below in turn. A process is named after its way, so that its stack can be checked.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int ends[2];

static void in_read(void)
{
	char byte;

	(void)!read(ends[0], &byte, 1);
}

static void in_poll(void)
{
	struct pollfd p = { .fd = ends[0], .events = POLLIN };

	poll(&p, 1, -1);
}

static void in_nanosleep(void)
{
	struct timespec long_time = { .tv_sec = 1000000 };

	nanosleep(&long_time, NULL);
}

static void in_futex(void)
{
	static int word;

	syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
}

static void in_pause(void)
{
	pause();
}

static void in_wait(void)
{
	if (fork() == 0) {
		prctl(PR_SET_NAME, "sleep-waited");
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	wait(NULL);
}

static void in_epoll(void)
{
	struct epoll_event event = { .events = EPOLLIN };
	int set = epoll_create1(EPOLL_CLOEXEC);

	epoll_ctl(set, EPOLL_CTL_ADD, ends[0], &event);
	epoll_wait(set, &event, 1, -1);
}

static void in_select(void)
{
	fd_set set;

	FD_ZERO(&set);
	FD_SET(ends[0], &set);
	select(ends[0] + 1, &set, NULL, NULL, NULL);
}

static void in_accept(void)
{
	int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr address = { .sa_family = AF_UNIX };

	bind(s, &address, sizeof(sa_family_t));	/* the kernel chooses the name */
	listen(s, 1);
	accept(s, NULL, NULL);
}

static void *thread_sleeps(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, "sleep-thread");
	for (;;)
		pause();
	return NULL;
}

static void in_join(void)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, thread_sleeps, NULL) == 0)
		pthread_join(thread, NULL);
	pause();
}

static const struct {
	const char *name;
	void (*sleep)(void);
} ways[] = {
	{ "sleep-read", in_read },
	{ "sleep-poll", in_poll },
	{ "sleep-nano", in_nanosleep },
	{ "sleep-futex", in_futex },
	{ "sleep-pause", in_pause },
	{ "sleep-wait", in_wait },
	{ "sleep-epoll", in_epoll },
	{ "sleep-select", in_select },
	{ "sleep-accept", in_accept },
	{ "sleep-join", in_join },
};

int main(int argc, char **argv)
{
	int count = argc > 1 ? atoi(argv[1]) : 8;

	if (pipe(ends))
		return 1;
	for (int i = 0; i < count; i++) {
		unsigned way = i % (sizeof(ways) / sizeof(ways[0]));
		pid_t pid = fork();

		if (pid < 0)
			return 1;
		if (pid == 0) {
			prctl(PR_SET_NAME, ways[way].name);
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			for (;;)
				ways[way].sleep();
		}
	}
	while (wait(NULL) > 0)
		;
	return 0;
}
