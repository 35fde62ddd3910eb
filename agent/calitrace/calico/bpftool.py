"""What ``bpftool -j map dump`` wrote: its lists of hexadecimal bytes. Its formatted part loses anonymous unions.

Source: tools/bpf/bpftool/map.c (print_entry_json) in Linux.
"""

from __future__ import annotations

import json
from typing import Any

from calitrace.calico.maps import RawMap, identify
from calitrace.calico.maptables import layouts
from calitrace.errors import Malformed

_RECORD = "bpftool dump"


def read(text: str, name: str) -> RawMap:
    """A map called *name*. Sizes are those of its entries; of an empty map those we know. Raises Malformed."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise Malformed(0, "JSON", str(wrong)[:60], _RECORD) from wrong
    if not isinstance(document, list):
        raise Malformed(0, "a list of entries", type(document).__name__, _RECORD)
    entries: list[tuple[bytes, bytes]] = []
    cpus = 1
    try:
        for item in document:
            if "values" in item:
                cpus = len(item["values"])
                value = b"".join(_bytes(each["value"]) for each in item["values"])
            else:
                value = _bytes(item["value"])
            entries.append((_bytes(item["key"]), value))
    except (KeyError, TypeError, ValueError) as wrong:
        raise Malformed(len(entries), "a key and a value", f"{type(wrong).__name__}: {wrong}", _RECORD) from wrong
    sizes = {(len(key), len(value)) for key, value in entries}
    if len(sizes) > 1:
        raise Malformed(0, "entries of one size", f"{len(sizes)} sizes", _RECORD)
    if not sizes:
        base, version, _ = identify(name)
        sizes = {(e.key.size, e.value.size) for e in layouts() if (e.base, e.version) == (base, version)} or {(0, 0)}
    key_size, value_size = sizes.pop()
    return RawMap(name, name, 0, key_size, value_size // cpus, len(entries), cpus, entries)


def _bytes(numbers: Any) -> bytes:
    return bytes(int(each, 16) for each in numbers)
