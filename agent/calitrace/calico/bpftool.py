"""What ``bpftool map dump`` wrote, as JSON (``-j``, ``-p``) or as text: the bytes of keys and values.

Text has bytes of maps without BTF only. Of those with BTF it prints the members, as JSON's ``formatted`` does: both
lose what lies in anonymous unions, which is most of a conntrack entry, so they are not read.
Source: tools/bpf/bpftool/map.c (print_entry_json, print_entry_plain, map_dump) in Linux.
"""

from __future__ import annotations

import json
import re
from typing import Any

from calitrace.calico.maps import RawMap, identify
from calitrace.calico.maptables import layouts
from calitrace.errors import Malformed

_RECORD = "bpftool dump"
_PART = re.compile(r"\s*(?P<part>key|value)(?: \(CPU \d+\))?:\s*(?P<bytes>(?:[0-9a-f]{2}(?:\s+|$))*)(?:<no entry>)?")
_END = re.compile(r"\s*Found (?P<count>\d+) elements?\s*")
_FORMATTED = re.compile(r'\s*\[\s*\{\s*"key":\s*[{\d"-]')


def read(text: str, name: str) -> RawMap:
    """A map called *name*. Sizes are those of its entries; of an empty map those we know. Raises Malformed.

    How many entries it may have is not in the file: ``max_entries`` is 0.
    """
    found = _of_json(text) if text.lstrip().startswith(("[", "{")) else _of_text(text)
    entries = [(key, values) for key, values in found if values]
    shapes = {(len(key), len(values), len(values[0])) for key, values in entries}
    if len(shapes) > 1 or any(len(each) != len(values[0]) for _, values in entries for each in values):
        raise Malformed(0, "entries of one size", "several sizes", _RECORD)
    if not shapes:
        base, version, _ = identify(name)
        known = {(e.key.size, 1, e.value.size) for e in layouts() if (e.base, e.version) == (base, version)}
        if not known:
            raise Malformed(0, f"an entry, as we do not know the sizes of {name}", "none", _RECORD)
        shapes = known
    key_size, cpus, value_size = shapes.pop()
    return RawMap(name, name, 0, key_size, value_size, 0, cpus, [(key, b"".join(values)) for key, values in entries])


def _of_json(text: str) -> list[tuple[bytes, list[bytes]]]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as wrong:
        if _FORMATTED.match(text):
            raise _without_bytes() from wrong
        raise Malformed(0, "JSON", str(wrong)[:60], _RECORD) from wrong
    if not isinstance(document, list):
        raise Malformed(0, "a list of entries", type(document).__name__, _RECORD)
    if any(isinstance(item, dict) and "elements" in item for item in document):
        raise Malformed(0, "one map", f"{len(document)} of that name (dump one by its id or pin)", _RECORD)
    entries = []
    for index, item in enumerate(document):
        if not (isinstance(item, dict) and "key" in item and ("value" in item or "values" in item)):
            raise Malformed(index, "a key and a value", str(item)[:60], _RECORD)
        try:
            values = [each["value"] for each in item["values"]] if "values" in item else [item["value"]]
        except (KeyError, TypeError) as wrong:
            raise Malformed(index, "a value for each CPU", type(wrong).__name__, _RECORD) from wrong
        if any(isinstance(each, dict) and "error" in each for each in values):
            continue  # it had gone when bpftool looked it up
        entries.append((_bytes(item["key"], index), [_bytes(each, index) for each in values]))
    return entries


def _bytes(numbers: Any, index: int) -> bytes:
    if not (isinstance(numbers, list) and all(isinstance(each, str) for each in numbers)):
        raise _without_bytes()
    try:
        return bytes(int(each, 16) for each in numbers)
    except ValueError as wrong:
        raise Malformed(index, "hexadecimal bytes", str(wrong)[:60], _RECORD) from wrong


def _without_bytes() -> Malformed:
    return Malformed(0, "bytes", "the members of a map with BTF, of which those in unions are lost", _RECORD)


def _of_text(text: str) -> list[tuple[bytes, list[bytes]]]:
    entries: list[tuple[bytes, list[bytes]]] = []
    at = 0
    while (part := _PART.match(text, at)) is not None:
        raw = bytes.fromhex(part["bytes"])
        if part["part"] == "key":
            entries.append((raw, []))
        elif not entries:
            raise Malformed(at, "a key", "a value without one", _RECORD)
        elif raw:
            entries[-1][1].append(raw)
        at = part.end()
    end = _END.fullmatch(text, at)
    if end is None:
        raise Malformed(at, "a key, a value or the end of the dump", repr(text[at : at + 40]), _RECORD)
    return entries
