"""Markers: a test that cannot run says why, or fails where CALITRACE_REQUIRE asks for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import settings

from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import syscall

# The same examples in every run: what they cover, and whether they pass, is the same everywhere, on a busy machine too.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def lacking() -> dict[str, str]:
    """What root tests lack here: the word for CALITRACE_REQUIRE, and the reason."""
    if os.geteuid() != 0:
        return {"root": "needs root"}
    try:
        syscall.program_ids()
    except (OSError, EnvironmentUnfit) as refused:
        return {"bpf": f"needs a kernel that takes BPF programs ({refused})"}
    return {}


def of_a_dead_run(name: str) -> bool:
    """Whether the first number in a name is the id of a process that is gone: what it made was never taken down."""
    found = re.search(r"\d+", name)
    return found is not None and not Path(f"/proc/{found[0]}").exists()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip root tests that cannot run, unless CALITRACE_REQUIRE (root,bpf) names what is lacking."""
    required = os.environ.get("CALITRACE_REQUIRE", "").split(",")
    reasons = [reason for word, reason in lacking().items() if word not in required]
    if not reasons:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason=reasons[0]))
