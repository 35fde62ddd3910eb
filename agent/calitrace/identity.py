"""How a probe is recognised anywhere on its way, after NAT and inside a tunnel.

A payload carries 16 bytes: magic, run id, flow, sequence, each 32 bits in network byte order. A TCP SYN has no
payload: its initial sequence number is the run's 12-bit tag and the probe's 20-bit number, which Calico's NAT and
encapsulation leave alone. No IP options: Calico counts and drops them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = 0xCA117ACE
TAG_SHIFT = 20
MAX_NUMBER = (1 << TAG_SHIFT) - 1
_PAYLOAD = struct.Struct("!IIII")
SIZE = _PAYLOAD.size


@dataclass(frozen=True)
class Identity:
    """*run_id*: of this run of calitrace, never 0. *sequence*: the probe's number in it."""

    run_id: int
    flow: int
    sequence: int


def encode(identity: Identity) -> bytes:
    """The 16 bytes of a payload."""
    return _PAYLOAD.pack(MAGIC, identity.run_id, identity.flow, identity.sequence)


def decode(raw: bytes) -> Identity | None:
    """The identity at the beginning of a payload; None for any other bytes."""
    if len(raw) < SIZE:
        return None
    magic, run_id, flow, sequence = _PAYLOAD.unpack_from(raw)
    return Identity(run_id, flow, sequence) if magic == MAGIC else None


def run_tag(run_id: int) -> int:
    """The 12 bits that stand for a run in a sequence number; never 0."""
    folded = (run_id ^ run_id >> 12 ^ run_id >> 24) & 0xFFF
    return folded or 1


def tcp_sequence(run_id: int, number: int) -> int:
    """The initial sequence number of probe *number*. Raises ValueError above MAX_NUMBER."""
    if not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"probe number {number} does not fit in {TAG_SHIFT} bits")
    return run_tag(run_id) << TAG_SHIFT | number


def tcp_number(sequence: int, run_id: int) -> int | None:
    """The probe number in a sequence number, or None when it is not of this run."""
    return sequence & MAX_NUMBER if sequence >> TAG_SHIFT == run_tag(run_id) else None
