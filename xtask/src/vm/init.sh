#!/bin/sh
# First process of a guest. Ports: ttyS0 the kernel's messages, ttyS1 what the
# tests print, ttyS2 one line at the very end, without which a run counts as crashed.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C RUST_BACKTRACE=0
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
for dir in /dev/shm /tmp /run; do mount -t tmpfs tmpfs $dir; done
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t tracefs tracefs /sys/kernel/tracing
for module in /modules/*.ko; do
	insmod "$module" || echo "cannot load $module" >/dev/console
done
ip link set lo up
# What systemd gives; a bare kernel leaves 4096.
ulimit -n 524288
stty -F /dev/ttyS1 raw
stty -F /dev/ttyS2 raw
# A session of its own: no signal of the console reaches the tests. With its path:
# busybox would run its own shell, which prefers its own `ip`.
setsid /bin/sh /tests/run </dev/null >/dev/ttyS1 2>&1
status=$?
# Waits until the port has sent everything.
stty -F /dev/ttyS1 sane
echo "exit $status" >/dev/ttyS2
stty -F /dev/ttyS2 sane
poweroff -f
