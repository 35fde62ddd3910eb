#!/usr/bin/env bash
# Build the wheel, install it in a clean environment elsewhere, and see that it finds its BPF sources.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf build/lib build/bdist* dist
.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w dist .
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
/usr/bin/python3 -m venv --system-site-packages "$elsewhere/venv"
"$elsewhere/venv/bin/python" -m pip install --quiet --disable-pip-version-check dist/*.whl
cd "$elsewhere"
venv/bin/calitrace --version
venv/bin/python -c 'from calitrace.kernel import loader; print(loader.bpf_dir(), len(loader.bpf_source("drop.bpf.c")), "bytes of drop.bpf.c")' | sed "s|$elsewhere/||"
if [ "$(id -u)" -eq 0 ]; then
	venv/bin/python -W ignore -c 'from calitrace.kernel.collectors import Collectors, Plan
with Collectors(Plan(run_id=1)) as collectors: print("attached:", ", ".join(collectors.programs()))'
fi
