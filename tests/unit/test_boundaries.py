"""Dependencies point inwards: the pure core reaches no edge, and only the edges reach the outside world."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "agent" / "calitrace"
EDGES = {"kernel", "probes", "cluster", "lab", "cli"}
OUTSIDE = {
    "bcc",
    "ctypes",
    "pyroute2",
    "scapy",
    "socket",
    "subprocess",
    "os",
    "time",
    "click",
    "importlib",
    "kubernetes",
}
ONLY_IN = {
    "bcc": {"kernel", "lab"},
    "ctypes": {"kernel"},
    "pyroute2": {"kernel", "lab"},
    "scapy": {"probes"},
    "click": {"cli"},
    "kubernetes": {"cluster"},
    "numpy": {"report"},
}


def imports(source: str) -> set[str]:
    """Full names of all modules that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the full name, so that this walk can follow it"
            assert node.module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_in_pure(source: str) -> set[str]:
    """What a pure module must not import. One step is enough: whatever pure module it imports is looked at as well."""
    return {
        name
        for name in imports(source)
        if name.split(".")[0] in OUTSIDE or (name.startswith("calitrace.") and name.split(".")[1] in EDGES)
    }


def modules(pure: bool) -> list[Path]:
    """All modules of the core, or of the edges."""
    return [p for p in sorted(PACKAGE.rglob("*.py")) if (p.relative_to(PACKAGE).parts[0] not in EDGES) is pure]


@pytest.mark.parametrize("path", modules(pure=True), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_pure_modules_reach_nothing(path: Path) -> None:
    assert wrong_in_pure(path.read_text()) == set()


def wrong_in_edge(edge: str, source: str) -> set[str]:
    """What a module below the folder *edge* must leave to another edge."""
    roots = {name.split(".")[0] for name in imports(source)}
    return {name for name in roots if edge not in ONLY_IN.get(name, {edge})}


@pytest.mark.parametrize("path", modules(pure=False), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_edges_keep_to_their_own(path: Path) -> None:
    assert wrong_in_edge(path.relative_to(PACKAGE).parts[0], path.read_text()) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "from socket import socket",
        "def f():\n    import bcc",
        "from calitrace.kernel import netns",
        "from calitrace import model\nfrom calitrace.cli import main",
    ],
)
def test_the_walk_finds_an_offence(line: str) -> None:
    assert wrong_in_pure(line)
    assert wrong_in_pure("from calitrace import model\nimport struct") == set()


def test_the_walk_finds_an_edge_out_of_bounds() -> None:
    assert wrong_in_edge("cli", "def f():\n    from ctypes import c_int") == {"ctypes"}
    assert wrong_in_edge("kernel", "import ctypes, bcc") == set()
    with pytest.raises(AssertionError, match="line 1"):
        imports("from . import model")


def test_both_sides_are_looked_at() -> None:
    assert {PACKAGE / "decode.py", PACKAGE / "calico" / "log.py"} <= set(modules(pure=True))
    assert {PACKAGE / "kernel" / "loader.py", PACKAGE / "cli" / "main.py"} <= set(modules(pure=False))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from calitrace.cli import main\n"
        "print([m for m in ('bcc', 'scapy', 'pyroute2', 'msgpack') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
