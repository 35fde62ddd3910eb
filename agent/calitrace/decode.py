"""Bytes of the ring buffer to events. Total: any bytes give an event or ``Malformed``."""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING, cast

from calitrace.errors import Malformed
from calitrace.events import (
    DROP,
    HEADER,
    HOP,
    LOG_HEAD,
    NO_REASON,
    STACK,
    STACK_FRAMES,
    STATE,
    TEXT_BYTES,
    EventType,
    HopKind,
    Match,
)
from calitrace.model import Drop, Event, Hop, LogLine, StackCopy, StateCopy
from calitrace.packet import dissect

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from calitrace.packet import Packet

_LOG_TYPE, _DROP_TYPE = int(EventType.LOG), int(EventType.DROP)  # an Enum's own comparison is Python


def decode(raw: bytes, vxlan_port: int = 4789) -> Event | LogLine:
    """One event. Raises Malformed (LayoutMismatch for a wrong size) on anything else."""
    ktime_ns, kind, cpu, netns = cast("tuple[int, int, int, int]", HEADER.unpack_head(raw))
    if kind == _LOG_TYPE:
        return _log(raw)
    if kind == EventType.DROP:
        values = DROP.decode(raw)
        reason = cast("int", values["skb_drop_reason"])
        return Drop(
            ktime_ns,
            cpu,
            netns,
            *_packet(values, vxlan_port),
            location=cast("int", values["location"]),
            skb_drop_reason=None if reason == NO_REASON else reason,
        )
    if kind == EventType.HOP:
        values = HOP.decode(raw)
        try:
            hop = HopKind(cast("int", values["kind"]))
        except ValueError:
            raise Malformed(HOP.offset("kind"), "a hop kind", str(values["kind"]), HOP.name) from None
        return Hop(ktime_ns, cpu, netns, *_packet(values, vxlan_port), kind=hop, rc=cast("int", values["rc"]))
    if kind == EventType.STATE:
        values = STATE.decode(raw)
        state = cast("bytes", values["state"])
        return StateCopy(
            ktime_ns,
            cpu,
            netns,
            cast("int", values["skbaddr"]),
            state[: cast("int", values["state_bytes"])],
        )
    if kind == EventType.STACK:
        values = STACK.decode(raw)
        addresses = struct.unpack(f"<{STACK_FRAMES}Q", cast("bytes", values["addresses"]))
        frames = cast("int", values["frames"])
        return StackCopy(ktime_ns, cpu, netns, cast("int", values["skbaddr"]), addresses[:frames])
    raise Malformed(HEADER.offset("type"), "a known event type", str(kind), HEADER.name)


def is_drop(raw: bytes) -> bool:
    """Whether it says to be a drop: a look at the header, where decoding takes a hundred times that."""
    return len(raw) >= HEADER.size and HEADER.unpack_head(raw)[1] == _DROP_TYPE


def _packet(values: dict[str, int | bytes], vxlan_port: int) -> tuple[int, int, int, int, int, Match, Packet]:
    length = min(cast("int", values["capture_bytes"]), len(cast("bytes", values["capture"])))
    return (
        cast("int", values["skbaddr"]),
        cast("int", values["ifindex"]),
        cast("int", values["skb_iif"]),
        cast("int", values["mark"]),
        cast("int", values["len_bytes"]),
        Match(cast("int", values["match"])),
        dissect(cast("bytes", values["capture"])[:length], vxlan_port),
    )


def _log(raw: bytes) -> LogLine:
    ktime_ns, _, cpu, lost, pid, length, comm = cast(
        "tuple[int, int, int, int, int, int, bytes]", LOG_HEAD.unpack_head(raw)
    )
    begin = LOG_HEAD.size
    text = raw[begin : begin + length].partition(b"\0")[0].decode(errors="replace")
    name = comm.partition(b"\0")[0].decode(errors="replace")
    return LogLine(ktime_ns, cpu, lost, pid, name, text, length >= TEXT_BYTES - 1)


class Decoder:
    """Decodes a stream, and counts what it could not decode: ``malformed`` by the record and what was found."""

    def __init__(self, vxlan_port: int = 4789) -> None:
        self.vxlan_port = vxlan_port
        self.malformed: Counter[str] = Counter()

    def iter_events(self, records: Iterable[bytes]) -> Iterator[Event | LogLine]:
        """The events of *records*, in their order."""
        for raw in records:
            try:
                yield decode(raw, self.vxlan_port)
            except Malformed as wrong:
                self.malformed[f"{wrong.record}: {wrong.actual}"] += 1
