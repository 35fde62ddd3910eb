"""Markers: a test that cannot run says why, or fails where CALITRACE_REQUIRE asks for it."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip root tests for others, unless CALITRACE_REQUIRE names root."""
    if os.geteuid() == 0 or "root" in os.environ.get("CALITRACE_REQUIRE", "").split(","):
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))
