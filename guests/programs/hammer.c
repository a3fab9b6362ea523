// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * hammer N FILE [getpid|uname]: N processes that make one system call continuously and check every
 * result. It must be either the stock kernel's (old) or that of the patches in guests/patches
 * (new); any other result is counted as wrong.
 *
 * With N = 0 it makes the call once, itself, and prints which result it got: old, new or wrong.
 *
 * On SIGUSR1, and at the end (SIGTERM, SIGINT), FILE is replaced by a report: a line of totals,
 * then a line for each process.
 *   calls, old, new, wrong: number of calls, and of results of each kind
 *   to_new, to_old: how often a process's results changed from old to new, and back
 *   longest_ms: the longest time between two results of a process, including scheduling
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* What guests/patches/getpid.c adds to the PID, and the sysname of guests/patches/uname.c. */
#define NEW_PID_OFFSET 1000000
#define NEW_SYSNAME "outpatch"

enum answer { OLD, NEW, WRONG };
static const char *const names[] = { "old", "new", "wrong" };

struct counter {
	pid_t pid;
	unsigned long answers[3];
	unsigned long to_new, to_old, longest_ns;
	unsigned last;
};

static struct counter *counters;
static int count;
static const char *file;
static volatile sig_atomic_t report_wanted, end_wanted;

static enum answer ask_getpid(pid_t self)
{
	long got = syscall(SYS_getpid);

	return got == self ? OLD : got == self + NEW_PID_OFFSET ? NEW : WRONG;
}

static enum answer ask_uname(pid_t self)
{
	struct utsname name;

	(void)self;
	if (uname(&name))
		return WRONG;
	return !strcmp(name.sysname, "Linux") ? OLD : !strcmp(name.sysname, NEW_SYSNAME) ? NEW : WRONG;
}

static unsigned long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ul + t.tv_nsec;
}

static void hammer(struct counter *c, enum answer (*ask)(pid_t))
{
	pid_t self = syscall(SYS_gettid);
	unsigned long before = now_ns();

	prctl(PR_SET_NAME, "hammering");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGUSR1, SIG_IGN);
	signal(SIGTERM, SIG_DFL);
	signal(SIGINT, SIG_IGN);
	c->pid = self;
	c->last = WRONG;
	for (;;) {
		enum answer a = ask(self);
		unsigned long now = now_ns();

		c->answers[a]++;
		if (c->last == OLD && a == NEW)
			c->to_new++;
		if (c->last == NEW && a == OLD)
			c->to_old++;
		c->last = a;
		if (now - before > c->longest_ns)
			c->longest_ns = now - before;
		before = now;
	}
}

static void write_report(void)
{
	struct counter sum = { 0 };
	char draft[256];
	FILE *out;

	snprintf(draft, sizeof(draft), "%s.new", file);
	out = fopen(draft, "w");
	if (!out)
		return;
	for (int i = 0; i < count; i++) {
		for (int a = OLD; a <= WRONG; a++)
			sum.answers[a] += counters[i].answers[a];
		sum.to_new += counters[i].to_new;
		sum.to_old += counters[i].to_old;
		if (counters[i].longest_ns > sum.longest_ns)
			sum.longest_ns = counters[i].longest_ns;
	}
	fprintf(out, "processes=%d calls=%lu old=%lu new=%lu wrong=%lu to_new=%lu to_old=%lu longest_ms=%lu\n", count,
		sum.answers[OLD] + sum.answers[NEW] + sum.answers[WRONG], sum.answers[OLD], sum.answers[NEW],
		sum.answers[WRONG], sum.to_new, sum.to_old, sum.longest_ns / 1000000);
	for (int i = 0; i < count; i++) {
		struct counter *c = &counters[i];

		fprintf(out, "pid=%d old=%lu new=%lu wrong=%lu to_new=%lu to_old=%lu last=%s\n", c->pid, c->answers[OLD],
			c->answers[NEW], c->answers[WRONG], c->to_new, c->to_old,
			names[c->last]);
	}
	fclose(out);
	rename(draft, file);
}

static int ask_once(enum answer (*ask)(pid_t))
{
	prctl(PR_SET_NAME, "hammering");
	return puts(names[ask(syscall(SYS_gettid))]) < 0;
}

static void on_signal(int number)
{
	if (number == SIGUSR1)
		report_wanted = 1;
	else
		end_wanted = 1;
}

int main(int argc, char **argv)
{
	enum answer (*ask)(pid_t) = ask_getpid;
	struct sigaction action = { .sa_handler = on_signal };
	sigset_t signals, none;

	if (argc < 3) {
		fprintf(stderr, "usage: hammer N FILE [getpid|uname]\n");
		return 2;
	}
	count = atoi(argv[1]);
	file = argv[2];
	if (argc > 3 && !strcmp(argv[3], "uname"))
		ask = ask_uname;
	if (count < 0 || count > 10000)
		return 2;
	if (count == 0)
		return ask_once(ask);
	counters = mmap(NULL, count * sizeof(*counters), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (counters == MAP_FAILED)
		return 1;
	sigemptyset(&none);
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR1);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	for (int i = 0; i < count; i++) {
		pid_t pid = fork();

		if (pid < 0)
			return 1;
		if (pid == 0)
			hammer(&counters[i], ask);
	}
	sigprocmask(SIG_BLOCK, &signals, NULL);
	while (!end_wanted) {
		if (report_wanted) {
			report_wanted = 0;
			write_report();
		}
		sigsuspend(&none);
	}
	for (int i = 0; i < count; i++)
		if (counters[i].pid)
			kill(counters[i].pid, SIGKILL);
	while (wait(NULL) > 0)
		;
	write_report();
	return 0;
}
