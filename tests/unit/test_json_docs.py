"""docs/json.md names every key that the code prints, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import calitrace
from calitrace.calico import maptables
from calitrace.calico.maps import RawMap
from calitrace.report import mapdump

SOURCE = Path(calitrace.__file__).parent
PARTS = re.split(r"^## ", (SOURCE.parent.parent / "docs" / "json.md").read_text(), flags=re.MULTILINE)[1:]
WORDS = {part.splitlines()[0].replace("`", ""): re.findall(r"`([^`]+)`", part) for part in PARTS}


def section(title: str) -> set[str]:
    """The words in code of one part, of several such as ``{a, b}`` each."""
    return {word for words in WORDS[title] for word in re.findall(r"[a-z][a-z0-9_]*", words)}


def printed(module: str) -> set[str]:
    """The keys of the dictionaries that functions of a module make."""
    nodes = [
        node
        for function in ast.walk(ast.parse((SOURCE / module).read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    ]
    keys = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
    keys += [node.slice for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


@pytest.mark.parametrize(
    ("module", "titles"),
    [
        ("probes/results.py", ["probe without --trace"]),
        ("report/jsonlines.py", ["probe without --trace", "probe --trace and report"]),
        ("report/log.py", ["log"]),
        ("report/drops.py", ["drops", "probe --trace and report"]),
        ("report/counters.py", ["counters"]),
        ("report/check.py", ["check"]),
        ("cli/doctor.py", ["doctor"]),
    ],
)
def test_every_key_is_named(module: str, titles: list[str]) -> None:
    assert printed(module)
    assert printed(module) - {"type"} - set().union(*map(section, titles)) == set()


@pytest.mark.parametrize(
    ("module", "title"),
    [("report/jsonlines.py", "probe --trace and report"), ("report/log.py", "log"), ("report/drops.py", "drops"),
     ("report/counters.py", "counters")],
)  # fmt: skip
def test_every_named_key_is_printed(module: str, title: str) -> None:
    rows = re.findall(r"^\| (`.*?) \|", next(p for p in PARTS if p.splitlines()[0].replace("`", "") == title), re.M)
    named = {word for row in rows for word in re.findall(r"`([a-z_]+)`", row)}
    assert named
    assert named - printed(module) == set()


def members() -> dict[str, set[str]]:
    """Base name of a map to the keys of its entries, of every version that there is a table for."""
    found: dict[str, set[str]] = {}
    for layout in maptables.layouts():
        entry = (bytes(layout.key.size), bytes(layout.value.size))
        if "routes" in layout.base:
            entry = (entry[0], b"\x0c" + entry[1][1:])
        raw = RawMap(
            name=f"{layout.base}{layout.version if layout.version > 1 else ''}",
            pin="",
            map_type=1,
            key_size=layout.key.size,
            value_size=layout.value.size,
            max_entries=1,
            cpus=1,
            entries=[entry],
        )
        (plain,) = mapdump.iter_objects(raw, mapdump.Context())
        found.setdefault(layout.base.removeprefix("cali_").removeprefix("v4_").removeprefix("v6_"), set()).update(plain)
    return found


MAPS = {
    "affinity": ["nat_aff"],
    "arp": ["arp"],
    "cleanup-queue": ["ccq"],
    "connect-time": ["ct_nats", "srmsg"],
    "failsafes": ["fsafes"],
    "fragments": ["frags", "frgfwd"],
    "ifstate": ["iface"],
    "ipsets": ["ip_sets"],
    "maglev": ["mglv"],
    "policy": ["rule_ctrs"],
    "profiling": ["profiling"],
    "qos": ["qos", "qos_conn"],
    "routes": ["routes"],
    "spoofing": ["sprefix"],
}
IN_PROSE = {"ct", "nat_fe", "nat_be", "counters"}  # have a paragraph each


def test_members_of_maps() -> None:
    part = next(p for p in PARTS if p.startswith("`maps`"))
    rows = {
        name: set(re.findall(r"`([a-z0-9_]+)`", text)) for name, text in re.findall(r"^\| `(.*?)` \|(.*)", part, re.M)
    }
    found = members()
    assert rows.keys() == MAPS.keys()
    assert {base for bases in MAPS.values() for base in bases} | IN_PROSE >= found.keys()
    routes = {"next_hop"}  # in place of the interface, for all but local workloads
    for name, bases in MAPS.items():
        keys = set().union(*(found[base] for base in bases)) - {"map"} | (routes if name == "routes" else set())
        assert rows[name] == keys, name
    for base in IN_PROSE:
        assert found[base] - section("maps") == set()
