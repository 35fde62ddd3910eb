#!/usr/bin/env bash
# Try this checkout's HEAD on the kernel of a Debian release: make a small VM, run doctor, the demo and the kernel and
# lab tests in it. Root only; without KVM all tests take hours: give a COMMAND.
#
#     tools/vm.sh bookworm|trixie [KERNEL [COMMAND]]      KERNEL: suite that the kernel comes from, default the first
#
# Python 3.10 is asked for: Debian 11's kernel is run with Debian 12's userland (tools/vm.sh bookworm bullseye).
# ACCEL=tcg does without KVM. Everything is in one directory below TMPDIR, removed at the end; the VM has no network.
set -euo pipefail

TESTS='.venv/bin/calitrace doctor || true; make demo; .venv/bin/python -m pytest -q tests/kernel tests/netns'
BOOT_S=180

fail() {
	printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
	exit 3
}

suite=${1:-}
case "$suite" in
bookworm | trixie) ;;
*) fail "no Debian release given" "tools/vm.sh bookworm|trixie [KERNEL [COMMAND]]" ;;
esac
kernel=${2:-$suite}
command=${3:-$TESTS}
accel=${ACCEL:-kvm}
[ "$(id -u)" -eq 0 ] || fail "a chroot and a VM need root" "run it with sudo"
[ "$(uname -m)" = x86_64 ] || fail "only amd64 is known here" "run it on amd64"
command -v qemu-system-x86_64 >/dev/null || fail "qemu is missing" "apt-get install qemu-system-x86"
command -v debootstrap >/dev/null || fail "debootstrap is missing" "apt-get install debootstrap"
[ "$accel" != kvm ] || [ -w /dev/kvm ] || fail "there is no KVM here (/dev/kvm)" "ACCEL=tcg does without, ten times slower"

here=$(dirname "$0")
work=$(mktemp -d "${TMPDIR:-/tmp}/vm-$suite.XXXXXX")
qemu=
trap 'trap "" INT TERM; [ -z "$qemu" ] || kill "$qemu" 2>/dev/null || true; rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM

# shellcheck disable=SC2016
TMPDIR=$work KEEP=1 "$here/fresh-machine.sh" "$suite" bash -euc '
	bash tools/setup.sh binutils gcc iproute2 nftables tshark kmod
	printf "== kernel of %s\n" "$1"
	grep -q " $1 main" /etc/apt/sources.list || sed -n "1s/^deb \([^ ]*\) .*/deb \1 $1 main/p" /etc/apt/sources.list >>/etc/apt/sources.list
	apt-get -qq update
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "linux-image-amd64/$1" </dev/null >/tmp/log 2>&1 ||
		{ tail -n 5 /tmp/log >&2; exit 1; }
	apt-get -qq clean
' bash "$kernel" || fail "the root file system could not be made" "see above"
root=$(echo "$work"/fresh-*)
cp "$(find "$root/boot" -name 'vmlinuz-*')" "$work/vmlinuz"
cp "$(find "$root/boot" -name 'initrd.img-*')" "$work/initrd"
printf '%s\n' "$command" >"$root/srv/command"
cat >"$root/srv/init" <<'END'
#!/bin/bash
# The VM's first and only service: run the command, say how it ended, power off.
export HOME=/root TERM=dumb LC_ALL=C.UTF-8 CI=true CALITRACE_REQUIRE=root
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sysfs /sys
mountpoint -q /run || mount -t tmpfs tmpfs /run
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tracefs tracefs /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
cd /srv/calitrace
printf '== up: Linux %s\n' "$(uname -r)"
bash -ec "$(cat /srv/command)" </dev/null
printf '== status %s\n' $?
mkfifo /run/off
mount -o remount,ro /
echo o >/proc/sysrq-trigger
read -r <>/run/off # it comes later, and nothing can be read from the disk then
END
chmod +x "$root/srv/init"
truncate -s 8G "$work/disk"
mkfs.ext4 -q -F -d "$root" "$work/disk"
rm -rf --one-file-system "$root"

qemu-system-x86_64 -accel "$accel" -cpu max -smp 2 -m 3072 -nodefaults -nographic -no-reboot -nic none \
	-kernel "$work/vmlinuz" -initrd "$work/initrd" -drive "file=$work/disk,format=raw,if=virtio" \
	-append "root=/dev/vda rw quiet panic=-1 console=ttyS0 init=/srv/init" \
	-serial "file:$work/console" </dev/null &
qemu=$!
touch "$work/console"
grep -qm 1 '== up' < <(timeout "$BOOT_S" tail -n +1 -f --pid="$qemu" "$work/console") ||
	{
		tail -n 20 "$work/console" >&2
		fail "the VM did not boot within $BOOT_S s" "see above; where KVM runs no such kernel (a VM in a VM): ACCEL=tcg"
	}
tail -n +1 -f --pid="$qemu" "$work/console" &
wait $! # not in the foreground, where a signal would wait for it
grep -q '^== status 0' "$work/console" || fail "the command failed in the VM" "see above"
