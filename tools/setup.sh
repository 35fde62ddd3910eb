#!/usr/bin/env bash
# Make .venv with everything calitrace and its tests need. Debian 12 and 13, Ubuntu 22.04 and 24.04; root or sudo.
# Safe to run again: what is there already is left alone. Arguments: further system packages (make test: what tests compare with; make bench: bpftrace).
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(python3-bpfcc python3-venv tcpdump "$@")
STAMP=.venv/.calitrace-setup

fail() {
	printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
	exit 3
}

step() {
	printf '[%s of 4] %s\n' "$1" "$2"
}

system() {
	if [ "$(id -u)" -eq 0 ]; then
		"$@"
	else
		sudo "$@"
	fi
}

step 1 "distribution"
[ -r /etc/os-release ] || fail "this is no Linux distribution with /etc/os-release" "use Debian 12/13 or Ubuntu 22.04/24.04"
# shellcheck source=/dev/null
. /etc/os-release
case "${ID:-}:${VERSION_ID:-}" in
debian:12 | debian:13 | ubuntu:22.04 | ubuntu:24.04) ;;
*) fail "${PRETTY_NAME:-this distribution} is not supported" "use Debian 12/13 or Ubuntu 22.04/24.04, or install ${PACKAGES[*]} by hand and read CONTRIBUTING.md" ;;
esac
if [ "$ID" = ubuntu ]; then # there bpftool is a script in front of the kernel's own, and its name stands for several packages
	tools=linux-tools-$(uname -r)
	[ -n "$(apt-cache search --names-only "^$tools\$")" ] || tools=linux-tools-generic
	PACKAGES=("${PACKAGES[@]/#bpftool/$tools}")
fi

step 2 "system packages: ${PACKAGES[*]}"
missing=()
for package in "${PACKAGES[@]}"; do
	[ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
	[ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null || fail "${missing[*]} must be installed, and this is neither root nor is there sudo" "run as root: apt-get install ${missing[*]}"
	log=$(mktemp)
	trap 'rm -f "$log"' EXIT
	printf '      installing %s: a minute or so\n' "${missing[*]}"
	# A third party's repository that does not answer must not stop us: whether the packages can be had decides.
	system apt-get update >"$log" 2>&1 </dev/null || true
	system env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1 </dev/null || {
		tail -n 5 "$log" >&2
		fail "apt could not install ${missing[*]}" "see above; the packages are in Debian's main and Ubuntu's universe: is that enabled and reachable?"
	}
fi

step 3 "virtual environment .venv, from the interpreter that has BCC"
wanted=$(cat setup.py requirements-dev.txt tools/setup.sh | sha256sum)
if [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c 'import bcc, calitrace' 2>/dev/null; then
	step 4 "nothing to do"
	exit 0
fi
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import bcc, pip' 2>/dev/null; then
	rm -rf .venv
	/usr/bin/python3 -m venv --system-site-packages .venv >/dev/null ||
		fail "/usr/bin/python3 cannot make a virtual environment" "apt-get install --reinstall python3-venv"
	.venv/bin/python -c 'import bcc' ||
		fail "/usr/bin/python3 has no working module bcc" "apt-get install --reinstall python3-bpfcc"
fi

step 4 "Python packages"
printf '      installing from requirements-dev.txt\n'
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt ||
	fail "pip could not install the packages of requirements-dev.txt" "see above; is a package index reachable?"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e . ||
	fail "pip could not install calitrace itself" "see above"
printf '%s\n' "$wanted" >"$STAMP"
