#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The init of a guest: mounts file systems, runs a script if there is one, then runs a root shell on
# the console, and starts it again whenever it ends. The script is a file given at build time
# (/etc/outpatch-script) or named on the kernel's command line (outpatch_script=PATH).
export PATH=/bin HOME=/root TERM=${TERM:-vt100}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
ip link set lo up
hostname guest
cd /root
script=${outpatch_script:-/etc/outpatch-script}
if [ -f "$script" ]; then
	sh "$script"
	echo "outpatch script ended: $?"
fi
echo "outpatch guest ready"
while :; do
	PS1='guest# ' setsid cttyhack sh
	# If the shell failed, the kernel may have logged the reason.
	ended=$?
	if [ $ended != 0 ]; then
		echo "the shell on the console ended: $ended"
		dmesg | tail -n 20
	fi
done
