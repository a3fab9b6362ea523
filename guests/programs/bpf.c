// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * bpf [FUNCTION]: loads a BPF program that does nothing, prints `loaded`, and keeps it loaded. With
 * FUNCTION the program is attached to the entry of that kernel function (fentry), and `attached` is
 * printed.
 */
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static long bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

/* How many bytes follow the header of a BTF type of this kind and with this many members. */
static size_t extra_size(uint32_t kind, uint32_t members)
{
	switch (kind) {
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case 17: /* BTF_KIND_DECL_TAG */
		return 4;
	case BTF_KIND_ARRAY:
		return sizeof(struct btf_array);
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
	case BTF_KIND_DATASEC:
	case 19: /* BTF_KIND_ENUM64 */
		return members * 12;
	case BTF_KIND_ENUM:
	case BTF_KIND_FUNC_PROTO:
		return members * 8;
	default:
		return 0;
	}
}

/* The BTF id of a function, or 0. */
static uint32_t type_of(const char *function)
{
	int file = open("/sys/kernel/btf/vmlinux", O_RDONLY);
	struct stat stat;
	char *all;

	if (file < 0 || fstat(file, &stat))
		return 0;
	all = malloc(stat.st_size);
	for (off_t done = 0; done < stat.st_size;) {
		ssize_t got = read(file, all + done, stat.st_size - done);

		if (got <= 0)
			return 0;
		done += got;
	}
	const struct btf_header *head = (const void *)all;
	const char *at = all + head->hdr_len + head->type_off;
	const char *end = at + head->type_len;
	const char *names = all + head->hdr_len + head->str_off;

	for (uint32_t number = 1; at < end; number++) {
		const struct btf_type *type = (const void *)at;
		uint32_t kind = BTF_INFO_KIND(type->info);

		if (kind == BTF_KIND_FUNC && !strcmp(names + type->name_off, function))
			return number;
		at += sizeof(*type) + extra_size(kind, BTF_INFO_VLEN(type->info));
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct bpf_insn code[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attr;
	long program;

	memset(&attr, 0, sizeof(attr));
	attr.prog_type = BPF_PROG_TYPE_SOCKET_FILTER;
	attr.insns = (uintptr_t)code;
	attr.insn_cnt = sizeof(code) / sizeof(code[0]);
	attr.license = (uintptr_t)"GPL";
	strcpy(attr.prog_name, "outpatch_none");
	if (argc > 1) {
		attr.prog_type = BPF_PROG_TYPE_TRACING;
		attr.expected_attach_type = BPF_TRACE_FENTRY;
		attr.attach_btf_id = type_of(argv[1]);
	}
	program = bpf(BPF_PROG_LOAD, &attr);
	if (program < 0) {
		perror("bpf");
		return 1;
	}
	if (argc > 1) {
		memset(&attr, 0, sizeof(attr));
		attr.raw_tracepoint.prog_fd = program;
		if (bpf(BPF_RAW_TRACEPOINT_OPEN, &attr) < 0) {
			perror("bpf: attaching");
			return 1;
		}
	}
	puts(argc > 1 ? "attached" : "loaded");
	fflush(stdout);
	pause();
	return 0;
}
