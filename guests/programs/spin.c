// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * spin [N]: N processes (default 1) that run in user mode and make no system calls.
 */
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int count = argc > 1 ? atoi(argv[1]) : 1;

	for (int i = 0; i < count; i++) {
		pid_t pid = fork();

		if (pid < 0)
			return 1;
		if (pid == 0) {
			prctl(PR_SET_NAME, "spinning");
			prctl(PR_SET_PDEATHSIG, 9);
			for (volatile unsigned long turns = 0;; turns++)
				;
		}
	}
	while (wait(NULL) > 0)
		;
	return 0;
}
