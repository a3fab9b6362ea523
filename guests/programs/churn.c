// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * churn FILE [KIND...]: makes system calls of all kinds at once and checks each result. The kinds
 * (all of them, unless some are named):
 *   fork     children that exit with a status; threads that are created and joined
 *   files    a file that is written, read back, compared and removed
 *   lo       a TCP connection on the loopback interface that echoes every number
 *   timers   sleeps and interval timers that must not end too early
 *   signals  signals to itself and between two processes, which are counted
 *   wait     pipes, futexes (with a mutex), poll and epoll between two threads
 *
 * On SIGUSR1, and at the end (SIGTERM, SIGINT), FILE is replaced by a report: a line `KIND done=N
 * wrong=N` for each kind, and then a line for the first wrong result of each kind that has any.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct tally {
	unsigned long done, wrong;
	char first[120];
};

static struct tally *mine;

#define CHECK(good, what) check(good, what, __LINE__)
static int check(int good, const char *what, int line)
{
	if (!good) {
		if (!mine->wrong)
			snprintf(mine->first, sizeof(mine->first), "%s (line %d, errno %d)", what, line, errno);
		mine->wrong++;
	}
	return good;
}

static long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000l + t.tv_nsec;
}

static void *plus_one(void *number)
{
	return (char *)number + 1;
}

static void do_fork(unsigned long round)
{
	pthread_t thread;
	void *got;
	int status, want = round % 200;
	pid_t pid = fork();

	if (pid == 0)
		_exit(want);
	if (CHECK(pid > 0, "fork"))
		CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == want, "wait status");
	if (CHECK(!pthread_create(&thread, NULL, plus_one, (void *)round), "thread"))
		CHECK(!pthread_join(thread, &got) && got == (void *)(round + 1), "join");
}

static void do_files(unsigned long round)
{
	static char out[32768], in[sizeof(out)];
	char name[64];
	FILE *file;

	snprintf(name, sizeof(name), "/tmp/churn.%d", getpid());
	memset(out, 'a' + round % 26, sizeof(out));
	memcpy(out, &round, sizeof(round));
	file = fopen(name, "w+");
	if (!CHECK(!!file, "open"))
		return;
	CHECK(fwrite(out, 1, sizeof(out), file) == sizeof(out) && !fflush(file), "write");
	rewind(file);
	CHECK(fread(in, 1, sizeof(in), file) == sizeof(in) && !memcmp(in, out, sizeof(in)), "read back");
	fclose(file);
	CHECK(!unlink(name), "unlink");
}

static void do_lo(unsigned long round)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof(at);
	int server = socket(AF_INET, SOCK_STREAM, 0), peer, status;
	unsigned long got;
	pid_t pid;

	CHECK(!bind(server, (void *)&at, len) && !listen(server, 1) && !getsockname(server, (void *)&at, &len), "listen");
	pid = fork();
	if (pid == 0) {
		peer = accept(server, NULL, NULL);
		while (read(peer, &got, sizeof(got)) == sizeof(got)) {
			got++;
			if (write(peer, &got, sizeof(got)) != sizeof(got))
				_exit(1);
		}
		_exit(0);
	}
	peer = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(!connect(peer, (void *)&at, len), "connect");
	for (unsigned long n = round; n < round + 20; n++) {
		got = 0;
		CHECK(write(peer, &n, sizeof(n)) == sizeof(n), "send");
		CHECK(read(peer, &got, sizeof(got)) == sizeof(got) && got == n + 1, "echo");
	}
	close(peer);
	CHECK(waitpid(pid, &status, 0) == pid && status == 0, "server's status");
	close(server);
}

static volatile sig_atomic_t alarms, signals;

static void on_alarm(int number)
{
	alarms++;
	(void)number;
}

static void do_timers(unsigned long round)
{
	struct timespec rest = { .tv_nsec = 1000000 + round % 7 * 500000 };
	struct itimerval timer = { .it_value.tv_usec = 3000 };
	long before = now_ns();
	sigset_t block, none;

	CHECK(!clock_nanosleep(CLOCK_MONOTONIC, 0, &rest, NULL), "sleep");
	CHECK(now_ns() - before >= rest.tv_nsec, "slept too short");
	sigemptyset(&none);
	sigemptyset(&block);
	sigaddset(&block, SIGALRM);
	sigprocmask(SIG_BLOCK, &block, NULL);
	alarms = 0;
	before = now_ns();
	setitimer(ITIMER_REAL, &timer, NULL);
	CHECK(sigsuspend(&none) == -1 && errno == EINTR && alarms == 1, "alarm");
	CHECK(now_ns() - before >= timer.it_value.tv_usec * 1000, "alarm too early");
	sigprocmask(SIG_UNBLOCK, &block, NULL);
}

static void on_signal(int number, siginfo_t *info, void *context)
{
	signals = info->si_value.sival_int;
	(void)number, (void)context;
}

static void do_signals(unsigned long round)
{
	int want = round & 0xffffff, status;
	pid_t pid;

	signals = -1;
	CHECK(!sigqueue(getpid(), SIGUSR2, (union sigval){ .sival_int = want }), "queue");
	CHECK(signals == want, "own signal");
	pid = fork();
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	CHECK(!kill(pid, SIGTERM), "kill");
	CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM, "killed");
}

struct ring {
	int to, from;
	unsigned long count;
	pthread_mutex_t lock;
};

static void *ring_peer(void *arg)
{
	struct ring *ring = arg;
	unsigned char byte;

	while (read(ring->to, &byte, 1) == 1) {
		pthread_mutex_lock(&ring->lock);
		ring->count++;
		pthread_mutex_unlock(&ring->lock);
		byte++;
		if (write(ring->from, &byte, 1) != 1)
			break;
	}
	return NULL;
}

static void do_wait(unsigned long round)
{
	int to[2], from[2], epoll = epoll_create1(0);
	struct ring ring = { .lock = PTHREAD_MUTEX_INITIALIZER };
	struct epoll_event event = { .events = EPOLLIN };
	unsigned char byte;
	pthread_t thread;

	CHECK(!pipe(to) && !pipe(from), "pipe");
	ring.to = to[0];
	ring.from = from[1];
	CHECK(!epoll_ctl(epoll, EPOLL_CTL_ADD, from[0], &event), "epoll");
	CHECK(!pthread_create(&thread, NULL, ring_peer, &ring), "thread");
	for (int n = 0; n < 20; n++) {
		struct pollfd poll_on = { .fd = from[0], .events = POLLIN };
		unsigned char want = round + n;

		CHECK(write(to[1], &want, 1) == 1, "write");
		pthread_mutex_lock(&ring.lock);
		CHECK(ring.count <= (unsigned)n + 1, "counted too far");
		pthread_mutex_unlock(&ring.lock);
		if (n % 2)
			CHECK(poll(&poll_on, 1, -1) == 1 && poll_on.revents & POLLIN, "poll");
		else
			CHECK(epoll_wait(epoll, &event, 1, -1) == 1, "epoll wait");
		CHECK(read(from[0], &byte, 1) == 1 && byte == (unsigned char)(want + 1), "ring");
	}
	close(to[1]);
	CHECK(!pthread_join(thread, NULL) && ring.count == 20, "ring's count");
	close(to[0]), close(from[0]), close(from[1]), close(epoll);
}

static const struct {
	const char *name;
	void (*work)(unsigned long round);
} kinds[] = {
	{ "fork", do_fork }, { "files", do_files }, { "lo", do_lo },
	{ "timers", do_timers }, { "signals", do_signals }, { "wait", do_wait },
};
#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

static struct tally *tallies;
static const char *file;
static volatile sig_atomic_t report_wanted, end_wanted;

static pid_t start(unsigned kind)
{
	struct sigaction on_alrm = { .sa_handler = on_alarm };
	struct sigaction on_usr2 = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };
	pid_t pid = fork();

	if (pid)
		return pid;
	prctl(PR_SET_NAME, kinds[kind].name);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGUSR1, SIG_IGN);
	signal(SIGTERM, SIG_DFL);
	signal(SIGINT, SIG_IGN);
	sigaction(SIGALRM, &on_alrm, NULL);
	sigaction(SIGUSR2, &on_usr2, NULL);
	mine = &tallies[kind];
	for (unsigned long round = 0;; round++) {
		kinds[kind].work(round);
		mine->done++;
	}
}

static void write_report(void)
{
	char draft[256];
	FILE *out;

	snprintf(draft, sizeof(draft), "%s.new", file);
	out = fopen(draft, "w");
	if (!out)
		return;
	for (unsigned k = 0; k < KINDS; k++)
		fprintf(out, "%s done=%lu wrong=%lu\n", kinds[k].name, tallies[k].done, tallies[k].wrong);
	for (unsigned k = 0; k < KINDS; k++)
		if (tallies[k].wrong)
			fprintf(out, "%s: first wrong: %s\n", kinds[k].name, tallies[k].first);
	fclose(out);
	rename(draft, file);
}

static void on_request(int number)
{
	if (number == SIGUSR1)
		report_wanted = 1;
	else
		end_wanted = 1;
}

static int wanted(int argc, char **argv, const char *kind)
{
	for (int i = 2; i < argc; i++)
		if (!strcmp(argv[i], kind))
			return 1;
	return argc == 2;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_request };
	pid_t pids[KINDS] = { 0 };
	sigset_t signals_used, none;

	if (argc < 2) {
		fprintf(stderr, "usage: churn FILE [KIND...]\n");
		return 2;
	}
	file = argv[1];
	tallies = mmap(NULL, sizeof(*tallies) * KINDS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (tallies == MAP_FAILED)
		return 1;
	sigemptyset(&none);
	sigemptyset(&signals_used);
	sigaddset(&signals_used, SIGUSR1);
	sigaddset(&signals_used, SIGTERM);
	sigaddset(&signals_used, SIGINT);
	for (unsigned k = 0; k < KINDS; k++)
		if (wanted(argc, argv, kinds[k].name))
			pids[k] = start(k);
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	sigprocmask(SIG_BLOCK, &signals_used, NULL);
	while (!end_wanted) {
		if (report_wanted) {
			report_wanted = 0;
			write_report();
		}
		sigsuspend(&none);
	}
	for (unsigned k = 0; k < KINDS; k++)
		if (pids[k] > 0)
			kill(pids[k], SIGKILL);
	while (wait(NULL) > 0)
		;
	write_report();
	return 0;
}
