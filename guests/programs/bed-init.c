// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The init of the nested test bed: mounts the host's file tree, runs one command in it, and passes
 * the command's input, output and exit status through a virtio port. A frame on the port is the
 * length of the payload (u32, little endian), the kind (u8), and the payload. The other end is
 * guests/src/bed/protocol.rs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { TO_STDIN = 1, TO_EOF = 2, TO_WINDOW = 3, TO_SPEC = 4, TO_SIGNAL = 5 };
enum { FROM_STDOUT = 1, FROM_STDERR = 2, FROM_STATUS = 3, FROM_READY = 4, FROM_FAILED = 5, FROM_ALIVE = 6 };

static int port = -1;

static void end(void)
{
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void send_all(const void *data, size_t size)
{
	const char *at = data;

	while (size) {
		ssize_t n = write(port, at, size);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			end();	/* the caller is gone */
		at += n;
		size -= n;
	}
}

static void send_frame(uint8_t kind, const void *data, uint32_t size)
{
	char head[5];

	memcpy(head, &size, 4);
	head[4] = kind;
	send_all(head, sizeof(head));
	send_all(data, size);
}

static void fail(const char *format, ...)
{
	char text[512];
	int error = errno;
	int n;
	va_list list;

	va_start(list, format);
	n = vsnprintf(text, sizeof(text) - 64, format, list);
	va_end(list);
	n += snprintf(text + n, 64, ": %s", strerror(error));
	fprintf(stderr, "bed-init: %s\n", text);
	if (port >= 0) {
		send_frame(FROM_FAILED, text, n);
		sleep(5);
	}
	end();
}

static void recv_all(void *data, size_t size)
{
	char *at = data;

	while (size) {
		ssize_t n = read(port, at, size);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			end();
		at += n;
		size -= n;
	}
}

static uint8_t recv_frame(char **data, uint32_t *size)
{
	char head[5];

	recv_all(head, sizeof(head));
	memcpy(size, head, 4);
	*data = malloc(*size + 1);
	if (!*data)
		fail("a frame of %u bytes", *size);
	recv_all(*data, *size);
	(*data)[*size] = 0;
	return head[4];
}

static void load_modules(void)
{
	char path[256], name[200];
	FILE *list = fopen("/modules/order", "r");

	while (list && fscanf(list, "%199s", name) == 1) {
		int fd;

		snprintf(path, sizeof(path), "/modules/%s", name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			fail("module %s", name);
		close(fd);
	}
}

static void open_port(void)
{
	struct pollfd p;

	glob_t found;

	/* The first number in the name is the device's index among all virtio devices. */
	for (int i = 0; i < 1000 && port < 0; i++) {
		if (glob("/dev/vport*p1", 0, NULL, &found) == 0) {
			port = open(found.gl_pathv[0], O_RDWR | O_CLOEXEC);
			globfree(&found);
		}
		if (port < 0)
			usleep(10000);
	}
	if (port < 0)
		fail("/dev/vport*p1");
	/* Until the host's end is connected, read() returns end of file. */
	for (int i = 0; i < 1000; i++) {
		p = (struct pollfd){ .fd = port, .events = POLLIN };
		if (poll(&p, 1, 0) >= 0 && !(p.revents & POLLHUP))
			return;
		usleep(10000);
	}
	fail("the host's end of the port");
}

static void must_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	if (mount(source, target, type, flags, data))
		fail("mount %s on %s", source, target);
}

static void make_folders(char *path)
{
	for (char *at = strchr(path + 1, '/'); at; at = strchr(at + 1, '/')) {
		*at = 0;
		mkdir(path, 0755);
		*at = '/';
	}
	mkdir(path, 0755);
}

/*
 * Mounts a private overlay over a folder of the host: its files are seen, and writes are discarded
 * at the end.
 */
static void scratch(const char *folder, const char *name)
{
	char target[64], upper[64], work[64], options[256];
	struct stat st;

	snprintf(target, sizeof(target), "/host%s", folder);
	if (stat(target, &st))
		return;
	snprintf(upper, sizeof(upper), "/scratch/%s", name);
	mkdir(upper, 0755);
	chmod(upper, st.st_mode & 07777);
	snprintf(work, sizeof(work), "/scratch/%s-work", name);
	mkdir(work, 0755);
	snprintf(options, sizeof(options), "lowerdir=/shared%s,upperdir=%s,workdir=%s", folder, upper, work);
	if (mount("overlay", target, "overlay", 0, options))
		must_mount("tmpfs", target, "tmpfs", 0, "mode=1777");
}

static void build_tree(void)
{
	mkdir("/shared", 0755);
	mkdir("/host", 0755);
	mkdir("/scratch", 0755);
	must_mount("host", "/shared", "virtiofs", 0, NULL);
	must_mount("/shared", "/host", NULL, MS_BIND, NULL);
	must_mount(NULL, "/host", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL);
	must_mount("tmpfs", "/scratch", "tmpfs", 0, NULL);
	scratch("/tmp", "tmp");
	scratch("/var/tmp", "var-tmp");
	must_mount("tmpfs", "/host/run", "tmpfs", 0, "mode=755");
	must_mount("proc", "/host/proc", "proc", 0, NULL);
	must_mount("sysfs", "/host/sys", "sysfs", 0, NULL);
	must_mount("devtmpfs", "/host/dev", "devtmpfs", 0, NULL);
	mkdir("/host/dev/pts", 0755);
	must_mount("devpts", "/host/dev/pts", "devpts", 0, "ptmxmode=666");
	mkdir("/host/dev/shm", 01777);
	must_mount("tmpfs", "/host/dev/shm", "tmpfs", 0, "mode=1777");
	symlink("/proc/self/fd", "/host/dev/fd");
	symlink("/proc/self/fd/0", "/host/dev/stdin");
	symlink("/proc/self/fd/1", "/host/dev/stdout");
	symlink("/proc/self/fd/2", "/host/dev/stderr");
	mount("debugfs", "/host/sys/kernel/debug", "debugfs", 0, NULL);
}

static void make_writable(const char *folder)
{
	char from[4200], to[4200];

	snprintf(from, sizeof(from), "/shared%s", folder);
	snprintf(to, sizeof(to), "/host%s", folder);
	make_folders(to);	/* a scratch folder may not have it */
	must_mount(from, to, NULL, MS_BIND, NULL);
}

static void loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (s >= 0) {
		ioctl(s, SIOCSIFFLAGS, &request);
		close(s);
	}
}

/*
 * The command, as guests/src/bed/command_spec.rs encodes it: NUL-terminated strings "key=value", in
 * this order: tty, rows, cols, cwd, writable..., arg..., env..., files
 */
struct spec {
	int tty;
	struct winsize window;
	char *cwd;
	long files;
	char **args, **env;
};

static void read_spec(struct spec *spec, char *data, uint32_t size)
{
	char *last = data + size;
	size_t args = 0, env = 0, most = 0;

	for (char *at = data; at < last; at += strlen(at) + 1)
		most++;
	spec->args = calloc(most + 1, sizeof(char *));
	spec->env = calloc(most + 1, sizeof(char *));
	for (char *at = data; at < last; at += strlen(at) + 1) {
		if (!strncmp(at, "tty=", 4))
			spec->tty = atoi(at + 4);
		else if (!strncmp(at, "rows=", 5))
			spec->window.ws_row = atoi(at + 5);
		else if (!strncmp(at, "cols=", 5))
			spec->window.ws_col = atoi(at + 5);
		else if (!strncmp(at, "cwd=", 4))
			spec->cwd = at + 4;
		else if (!strncmp(at, "writable=", 9))
			make_writable(at + 9);
		else if (!strncmp(at, "arg=", 4))
			spec->args[args++] = at + 4;
		else if (!strncmp(at, "env=", 4))
			spec->env[env++] = at + 4;
		else if (!strncmp(at, "files=", 6))
			spec->files = atol(at + 6);
	}
	if (!args)
		fail("no command");
}

/*
 * The host's file server has a descriptor for each file that this kernel knows, and the host limits
 * their number. Starts a process that has the kernel forget files before that limit is reached.
 * Files in use are not forgotten, nor are those of the bed's own file systems in memory: when many
 * are left, the next time is when a quarter of the limit has been added.
 */
static void start_keeper(long limit)
{
	enum { MOST_PER_SECOND = 20000 };
	struct sched_param first = { .sched_priority = 1 };
	int count = open("/proc/sys/fs/inode-nr", O_RDONLY | O_CLOEXEC);
	int drop = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);
	long next = limit;
	pid_t pid = fork();

	if (count < 0 || drop < 0 || pid < 0)
		fail("the limit of files");
	if (pid) {
		close(count);
		close(drop);
		return;
	}
	close(port);
	(void)!pwrite(drop, "4", 1, 0);	/* does not log each time */
	/* A busy command must not keep this process waiting. */
	sched_setscheduler(0, SCHED_FIFO, &first);
	for (;;) {
		char text[64] = "";
		long known, wait;

		(void)!pread(count, text, sizeof(text) - 1, 0);
		known = atol(text);
		if (known >= next) {
			if (pwrite(drop, "2", 1, 0) < 0)	/* dentries and inodes */
				fprintf(stderr, "bed-init: drop_caches: %s\n", strerror(errno));
			(void)!pread(count, text, sizeof(text) - 1, 0);
			known = atol(text);
			next = known + limit / 4 > limit ? known + limit / 4 : limit;
		}
		wait = (next - known) * (1000000 / MOST_PER_SECOND) / 2;
		usleep(wait < 10000 ? 10000 : wait > 2000000 ? 2000000 : wait);
	}
}

static void run_child(struct spec *spec, const char *pts, int in, int out, int err)
{
	struct rlimit files = { 65536, 65536 };
	int tty;
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setrlimit(RLIMIT_NOFILE, &files);
	setsid();
	if (pts) {
		tty = open(pts, O_RDWR);
		ioctl(tty, TIOCSCTTY, 0);
		in = out = err = tty;
	}
	dup2(in, 0);
	dup2(out, 1);
	dup2(err, 2);
	if (spec->cwd && chdir(spec->cwd)) {
		dprintf(2, "bed: %s: %s\n", spec->cwd, strerror(errno));
		_exit(126);
	}
	environ = spec->env;
	execvpe(spec->args[0], spec->args, spec->env);
	dprintf(2, "bed: %s: %s\n", spec->args[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

/* Bytes that are still to be written to the command's standard input. */
static char *pending;
static size_t pending_size;
static int pending_eof;
static int child_in = -1;
static int master = -1;

static void feed(void)
{
	ssize_t n;

	if (child_in < 0)
		return;
	if (pending_size) {
		n = write(child_in, pending, pending_size);
		if (n > 0) {
			pending_size -= n;
			memmove(pending, pending + n, pending_size);
		} else if (n < 0 && errno != EAGAIN && errno != EINTR) {
			pending_size = 0;
			pending_eof = 1;
		}
	}
	if (!pending_size && pending_eof) {
		if (master >= 0) {
			char end_of_file = 4;

			(void)!write(child_in, &end_of_file, 1);
		} else {
			close(child_in);
		}
		child_in = -1;
	}
}

static void from_host(pid_t child)
{
	char *data;
	uint32_t size;
	struct winsize window = { 0 };

	switch (recv_frame(&data, &size)) {
	case TO_STDIN:
		if (child_in < 0)
			break;
		pending = realloc(pending, pending_size + size + 1);
		if (!pending)
			fail("memory for the input");
		memcpy(pending + pending_size, data, size);
		pending_size += size;
		break;
	case TO_EOF:
		pending_eof = 1;
		break;
	case TO_WINDOW:
		if (sscanf(data, "%hu %hu", &window.ws_row, &window.ws_col) == 2 && master >= 0)
			ioctl(master, TIOCSWINSZ, &window);
		break;
	case TO_SIGNAL:
		kill(-child, atoi(data));
		break;
	}
	free(data);
}

/*
 * Passes on the bytes that can be read now; at end of file closes the descriptor and sets it to -1.
 */
static int pass(int *fd, uint8_t kind)
{
	static char buffer[65536];
	ssize_t n;

	if (*fd < 0)
		return 0;
	n = read(*fd, buffer, sizeof(buffer));
	if (n > 0) {
		send_frame(kind, buffer, n);
		return 1;
	}
	if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
		close(*fd);
		*fd = -1;
	}
	return 0;
}

static void on_child(int signal)
{
	(void)signal;	/* its only purpose is to interrupt ppoll */
}

static int reap(pid_t child, int *status)
{
	int one, found = 0;
	pid_t pid;

	while ((pid = waitpid(-1, &one, WNOHANG)) > 0)
		if (pid == child) {
			*status = one;
			found = 1;
		}
	return found;
}

static int serve(pid_t child, int *out, int *err)
{
	int status = 0;
	sigset_t block, open;
	struct sigaction action = { .sa_handler = on_child };
	struct timespec beat = { .tv_sec = 5 };
	int n;

	sigaction(SIGCHLD, &action, NULL);
	sigemptyset(&open);
	sigemptyset(&block);
	sigaddset(&block, SIGCHLD);
	sigprocmask(SIG_BLOCK, &block, NULL);
	for (;;) {
		struct pollfd p[4] = {
			/* Input is read from the host only as fast as the command reads it. */
			{ .fd = pending_size < 65536 ? port : -1, .events = POLLIN },
			{ .fd = *out, .events = POLLIN },
			{ .fd = *err, .events = POLLIN },
			{ .fd = pending_size || pending_eof ? child_in : -1, .events = POLLOUT },
		};

		if (reap(child, &status))
			break;
		n = ppoll(p, 4, &beat, &open);
		if (n < 0)
			continue;
		if (n == 0)	/* a heartbeat: distinguishes a silent command from a bed that hangs */
			send_frame(FROM_ALIVE, "", 0);
		if (p[0].revents & (POLLIN | POLLHUP))
			from_host(child);
		if (p[3].revents)
			feed();
		if (p[1].revents)
			pass(out, FROM_STDOUT);
		if (p[2].revents)
			pass(err, FROM_STDERR);
	}
	/* Pass on all that the command wrote, but do not wait for its background processes. */
	while (pass(out, FROM_STDOUT) | pass(err, FROM_STDERR))
		;
	return status;
}

static void nonblocking(int fd)
{
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/*
 * QEMU's emulation of SVM writes the word of pending interrupts at each entry to and exit from a
 * guest, without a lock against the thread that raises interrupts: sometimes an interrupt is lost
 * until the next one is raised. If the lost one was the timer's, there is no next one and the
 * machine hangs. The PIT, which the kernel no longer uses at this time, ticks in periodic mode even
 * if no tick is acknowledged: each tick makes QEMU deliver what was lost. Nothing handles the ticks
 * themselves.
 */
static void tick(void)
{
	enum { DATA = 0x40, MODE = 0x43, PERIODIC = 0x34, DIVISOR = 1193182 / 100 };

	if (ioperm(DATA, 4, 1))
		fail("the PIT");
	outb(PERIODIC, MODE);
	outb(DIVISOR & 0xff, DATA);
	outb(DIVISOR >> 8, DATA);
	ioperm(DATA, 4, 0);
}

int main(void)
{
	struct spec spec = { 0 };
	int in[2] = { -1, -1 }, out[2] = { -1, -1 }, err[2] = { -1, -1 };
	char *data, pts[64] = "";
	uint32_t size;
	pid_t child;
	int status;

	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	must_mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	must_mount("proc", "/proc", "proc", 0, NULL);
	signal(SIGPIPE, SIG_IGN);
	tick();
	load_modules();
	open_port();
	build_tree();
	if (recv_frame(&data, &size) != TO_SPEC)
		fail("the command did not come first");
	read_spec(&spec, data, size);
	loopback_up();
	sethostname("bed", 3);
	if (chroot("/host") || chdir("/"))
		fail("chroot");
	start_keeper(spec.files);
	if (spec.tty) {
		int number = -1, unlock = 0;

		master = open("/dev/pts/ptmx", O_RDWR | O_CLOEXEC | O_NOCTTY);
		if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) || ioctl(master, TIOCGPTN, &number))
			fail("a terminal");
		snprintf(pts, sizeof(pts), "/dev/pts/%d", number);
		ioctl(master, TIOCSWINSZ, &spec.window);
		nonblocking(master);
		child_in = out[0] = master;
	} else {
		if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC))
			fail("pipes");
		nonblocking(in[1]);
		nonblocking(out[0]);
		nonblocking(err[0]);
		child_in = in[1];
	}
	send_frame(FROM_READY, "", 0);
	child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0)
		run_child(&spec, spec.tty ? pts : NULL, in[0], out[1], err[1]);
	if (!spec.tty) {
		close(in[0]);
		close(out[1]);
		close(err[1]);
	}
	status = serve(child, &out[0], &err[0]);
	sync();
	send_frame(FROM_STATUS, &status, sizeof(status));
	for (;;)	/* until the host hangs up */
		recv_frame(&data, &size);
}
