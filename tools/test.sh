#!/usr/bin/env bash
# The whole suite. Root tests run as root; with CALITRACE_REQUIRE=root they fail where they cannot run.
set -euo pipefail
cd "$(dirname "$0")/.."
export COVERAGE_FILE=build/.coverage
mkdir -p build
.venv/bin/python -m coverage run -m pytest tests/unit "$@"
.venv/bin/python -m coverage report --fail-under=100 --skip-covered --show-missing --include="$(.venv/bin/python tools/pure_modules.py)"
if [ -d tests/kernel ]; then
	.venv/bin/python -m pytest tests/kernel tests/netns "$@"
fi
