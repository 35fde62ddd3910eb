"""What setup.py, the requirements and the checkout say of themselves agrees, and BCC stays the distribution's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from calitrace import __version__
from calitrace.kernel import loader

ROOT = Path(__file__).resolve().parent.parent.parent


def setup_arguments() -> dict[str, object]:
    """The literal arguments of setup() in setup.py."""
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    ]
    found = {}
    for keyword in calls[0].keywords:
        if keyword.arg and isinstance(keyword.value, ast.Constant | ast.List):
            found[keyword.arg] = ast.literal_eval(keyword.value)
    return found


def names(requirements: list[str]) -> set[str]:
    """Names of packages, without versions and comments."""
    return {re.split(r"[^a-z0-9_-]", line.lower())[0] for line in requirements} - {""}


def test_one_version() -> None:
    assert setup_arguments()["version"] == __version__


def test_bcc_never_comes_from_the_index() -> None:
    needed = setup_arguments()["install_requires"]
    assert isinstance(needed, list)
    development = names((ROOT / "requirements-dev.txt").read_text().splitlines())
    assert {"click", "msgpack", "numpy", "pyroute2", "pyyaml", "scapy"} == names(needed)
    assert names(needed) < development
    assert not {"bcc", "bpfcc"} & development


def test_bpf_is_found_and_licensed() -> None:
    assert loader.bpf_dir() == ROOT / "bpf"
    sources = sorted(p for p in loader.bpf_dir().rglob("*") if p.suffix in {".c", ".h"})
    assert sources
    for source in sources:
        assert "SPDX-License-Identifier: GPL-2.0-only" in source.read_text().splitlines()[0], source
