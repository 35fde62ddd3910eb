"""Conntrack entries as JSON lines, thousands at once.

A block of entries becomes a matrix of bytes: one row for each entry, one place for each member, as wide as the widest
of the block. What a member does not fill is NUL, and all NULs are left out at the end; JSON text itself has none.
What depends on few bits is put into words once for each combination of them.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from calitrace.calico import maptables
from calitrace.report import mapdump

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calitrace.calico.maps import RawMap
    from calitrace.calico.maptables import Layout
    from calitrace.report.mapdump import Context

Array: TypeAlias = npt.NDArray[Any]
_CODES: dict[str, Any] = {
    "u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8", "be32": ">u4", "ip4": ("u1", 4), "ip6": ("u1", 16),
}  # fmt: skip
_HEAD = (
    '{"map": <map>, "proto": <proto>, "addr_a": "<addr_a>", "port_a": <port_a>, "addr_b": "<addr_b>", '
    '"port_b": <port_b>, <about>, "created_or_rst_ns": <created_ns>, "last_seen_ns": <last_seen_ns>, "age_ns": <age>, '
)
_FORWARD = (
    '"from": "<from>", "rev_addr_a": "<rev_addr_a>", "rev_addr_b": "<rev_addr_b>", "rev_port_a": <rev_port_a>, '
    '"rev_port_b": <rev_port_b>, "nat_sport": <nat_sport>}\n'
)
_LEG = (
    '"LEG": {"bytes": <LEG_bytes>, "packets": <LEG_packets>, "seqno": <LEG_seqno>, "ifindex": <LEG_ifindex>, '
    '"interface": <LEG_interface>, "flags": <LEG_flags>}, '
)
_REST = (
    f"<after>, {_LEG.replace('LEG', 'ab')}{_LEG.replace('LEG', 'ba')}"
    '"orig_dst": "<orig_dst>", "orig_dport": <orig_dport>, "orig_sport": <orig_sport>, "orig_src": "<orig_src>", '
    '"tun_ip": "<tun_ip>"}\n'
)
_ROWS = 2048
_GROUP = 10_000


def iter_blocks(raw: RawMap, context: Context) -> Iterator[memoryview]:
    """The lines that ``mapdump.iter_objects`` gives as JSON, those of one block sorted by type of entry.

    Raises LayoutMismatch for a map of no known version.
    """
    layout = maptables.resolve(raw)
    if layout.origin or layout.version < 3:
        yield from (memoryview(json.dumps(each).encode() + b"\n") for each in mapdump.iter_objects(raw, context))
        return
    for count, *packed in maptables.blocks(raw):
        columns = [np.frombuffer(each, np.uint8).reshape(count, -1) for each in packed]
        whole = np.concatenate(columns, axis=1).view(_record(layout))[:, 0]
        for start in range(0, count, _ROWS):
            block = whole[start : start + _ROWS]
            kinds = sorted(set(block["type"].tolist()))  # np.unique of such imports masked arrays, for 20 ms
            for kind in kinds:
                chosen = block[block["type"] == kind] if len(kinds) > 1 else block
                yield _lines(raw.name, layout, context, chosen)


@lru_cache
def _record(layout: Layout) -> np.dtype[Any]:
    """Key and value as one record, with the members of a forward entry beside the others."""
    size = layout.key.size
    tables = ((0, layout.key), (size, layout.value), (size + layout.forward_at, mapdump.FORWARD[layout.ipv6]))
    rows = [(at + offset, _CODES[kind], name) for at, table in tables for offset, kind, name in table.rows]
    offsets, formats, names = zip(*rows, strict=True)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size + layout.value.size})


def _lines(name: str, layout: Layout, context: Context, entries: Array) -> memoryview:
    """Entries of one type."""
    words = _words(layout, context, entries)
    tail = _FORWARD if "from" in words else _REST
    literals = re.split(r"<(\w+)>", (_HEAD + tail).replace("<map>", json.dumps(name)))
    same, own = bytearray(), []
    for literal, member in zip(literals[::2], literals[1::2], strict=False):
        piece = words[member] if member in words else _text(entries[member])
        same += literal.encode()
        if len(piece) == 1:
            same += piece.tobytes()
        else:
            own.append((len(same), piece.view(f"V{piece.dtype.itemsize}")))
            same += bytes(piece.dtype.itemsize)
    same += literals[-1].encode()
    form: Any = {
        "names": [str(at) for at, _ in own],
        "formats": [piece.dtype for _, piece in own],
        "offsets": [at for at, _ in own],
        "itemsize": len(same),
    }
    flat = np.empty((len(entries), len(same)), np.uint8)
    flat[:] = np.frombuffer(same, np.uint8)
    rows = flat.view(np.dtype(form))[:, 0]
    for at, piece in own:
        rows[str(at)] = piece
    return memoryview(flat[flat != 0])


def _words(layout: Layout, context: Context, entries: Array) -> dict[str, Array]:
    """What is no number and no address by itself, as text."""
    high = np.uint64(32)
    flags = entries["proto"].astype(np.uint64) << high
    for index in range(4):
        flags |= entries[f"flags{index}"].astype(np.uint64) << np.uint64(8 * index)
    bits = entries["ab_bits"].astype(np.uint64) << high | entries["ba_bits"]
    first, which = _combinations(flags, bits, entries["created_ns"] != 0)
    kind = int(entries["type"][0])
    found = [_fragments(layout, context, kind, entries[row]) for row in first]
    words = {name: np.array([each[name] for each in found])[which] for name in found[0]}
    seen, now = entries["last_seen_ns"], np.uint64(context.now_ns)
    words["age"] = _number(np.where(seen > now, 0, now - seen)) if now else np.array([b"null"])
    if kind == mapdump.NAT_FWD:
        host = {(e, r): (entries[f"addr_{e}"] == entries[f"rev_addr_{r}"]).all(axis=1) for e in "ab" for r in "ab"}
        whole = {(e, r): same & (entries[f"port_{e}"] == entries[f"rev_port_{r}"]) for (e, r), same in host.items()}
        a, b = (whole[e, "a"] | whole[e, "b"] for e in "ab")
        return words | {"from": np.where(b | (~a & (host["b", "a"] | host["b", "b"])), b"b", b"a")}
    for leg in ("ab", "ba"):
        numbers, which = np.unique(entries[f"{leg}_ifindex"], return_inverse=True)
        places = [json.dumps(context.leg_interface(number)).encode() for number in numbers.tolist()]
        words[f"{leg}_interface"] = np.array(places)[which]
    return words


def _combinations(*columns: Array) -> tuple[Array, Array]:
    """(a row for each combination of values that there is, for each row the number of its combination)."""
    code = np.zeros(len(columns[0]), np.intp)
    for column in columns:
        if (column != column[0]).any():
            found, which = np.unique(column, return_inverse=True)
            code = code * len(found) + which
    _, first, which = np.unique(code, return_index=True, return_inverse=True)
    return first, which


def _fragments(layout: Layout, context: Context, kind: int, entry: Any) -> dict[str, bytes]:
    proto, ab, ba = (int(entry[name]) for name in ("proto", "ab_bits", "ba_bits"))
    flags = sum(int(entry[f"flags{index}"]) << 8 * index for index in range(4))
    about = {"type": mapdump.entry_type(kind), "flags": mapdump.names(flags, mapdump.CT_FLAGS)}
    found: dict[str, Any] = {"proto": mapdump.protocol(proto), "about": about}
    if kind != mapdump.NAT_FWD:
        found["after"] = mapdump.judged(layout, context, proto, flags, ab, ba, int(entry["created_ns"]))
        found |= {"ab_flags": mapdump.names(ab, mapdump.LEG_FLAGS), "ba_flags": mapdump.names(ba, mapdump.LEG_FLAGS)}
    return {
        name: json.dumps(each)[1:-1].encode() if isinstance(each, dict) else json.dumps(each).encode()
        for name, each in found.items()
    }


def _text(column: Array) -> Array:
    """A member as text, one for all where they are the same.

    *column*: [count] unsigned integers, or [count, 4] or [count, 16] bytes of addresses.
    """
    if (column == column[0]).all():
        column = column[:1]
    if column.ndim == 1:
        return _number(column)
    if column.shape[1] == 4:
        # The last octet is without a dot.
        text = _octets()[column + np.array([0, 0, 0, 256], np.intp)]
        return np.ascontiguousarray(text).view("V16")[:, 0]
    raw = [bytes(each) for each in column]
    known = {each: str(IPv6Address(each)).encode() for each in set(raw)}
    return np.array([known[each] for each in raw])


@lru_cache(maxsize=1)
def _octets() -> Array:
    return np.array([b"%d%b" % (octet, end) for end in (b".", b"") for octet in range(256)], "S4").view(np.uint32)


@lru_cache(maxsize=1)
def _groups() -> Array:
    """Four digits in four bytes, for 0 to 9999: of a whole number, of a number's end, of its beginning."""
    whole = np.array([b"%d" % number for number in range(_GROUP)], "S4")
    end = np.array([b"%04d" % number for number in range(_GROUP)], "S4")
    begin = np.concatenate([np.array([b""], "S4"), whole[1:]])
    return np.concatenate([whole, end, begin]).view(np.uint32)


def _number(column: Array) -> Array:
    """Unsigned integers as decimal digits, four at a time from the last."""
    rest = column.astype(np.uint64 if column.dtype.itemsize == 8 else np.uint32)
    groups: list[Array] = []
    while not groups or rest.any():
        above = rest // _GROUP
        start = np.where(above == 0, 2 * _GROUP if groups else 0, _GROUP)
        groups.append(_groups()[(rest - above * _GROUP).astype(np.intp) + start])
        rest = above
    return np.stack(groups[::-1], axis=1).view(f"V{4 * len(groups)}")[:, 0]
