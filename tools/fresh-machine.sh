#!/usr/bin/env bash
# Prove the README on a machine that has nothing: debootstrap a Debian release, clone this checkout's HEAD into it, and
# run make there in a chroot on the running kernel. Root only.
#
#     tools/fresh-machine.sh trixie|bookworm [COMMAND...]        COMMAND defaults to: make test
#
# Everything happens in mount and process namespaces of its own, so that no mount and no process outlives it, and in one
# directory below TMPDIR, removed at the end (KEEP=1 leaves it). HTTP proxies and a private certificate authority of the
# host, where it has them, are handed on.
set -euo pipefail

fail() {
	printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
	exit 3
}

suite=${1:-}
case "$suite" in
bookworm | trixie) shift ;;
*) fail "no Debian release given" "tools/fresh-machine.sh trixie|bookworm [COMMAND...]" ;;
esac
[ $# -gt 0 ] || set -- make test
[ "$(id -u)" -eq 0 ] || fail "a chroot needs root" "run it with sudo"
command -v debootstrap >/dev/null || fail "debootstrap is missing" "apt-get install debootstrap"

checkout=$(cd "$(dirname "$0")/.." && pwd)
root=$(mktemp -d "${TMPDIR:-/tmp}/fresh-$suite.XXXXXX")
trap 'trap "" INT TERM; [ -n "${KEEP:-}" ] || rm -rf --one-file-system "$root"' EXIT
trap 'exit 130' INT TERM

printf '== %s: debootstrap into %s\n' "$suite" "$root"
debootstrap --variant=minbase --include=ca-certificates,git,make "$suite" "$root" >"$root.log" 2>&1 || {
	tail -n 5 "$root.log" >&2
	fail "debootstrap of $suite failed" "see $root.log"
}
rm -f "$root.log"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
cp /etc/hosts "$root/etc/hosts"
if [ -s /etc/ssl/certs/ca-certificates.crt ]; then
	cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
fi
git clone --quiet --no-hardlinks "$checkout" "$root/srv/calitrace"

printf '== %s: %s\n' "$suite" "$*"
# shellcheck disable=SC2016
unshare --mount --pid --fork --kill-child --propagation private bash -euc '
	root=$1; shift
	mount --bind "$root" "$root" # a root that is a mount point: tests make mount namespaces of their own
	mount -t proc proc "$root/proc"
	mount -t sysfs sysfs "$root/sys"
	mount -t bpf bpf "$root/sys/fs/bpf"
	mount -t tracefs tracefs "$root/sys/kernel/tracing"
	mount --rbind /dev "$root/dev"
	mount -t tmpfs tmpfs "$root/run"
	exec chroot "$root" env -i HOME=/root TERM=dumb LC_ALL=C.UTF-8 CI=true CALITRACE_REQUIRE=root \
		PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_ROOT_USER_ACTION=ignore \
		${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
		sh -c "cd /srv/calitrace && exec \"\$@\"" sh "$@"
' bash "$root" "$@" </dev/null
