"""Drops that are nobody's loss: the kernel frees by kfree_skb what it also could have consumed.

One row for each cause: the kernel's reason (without prefix, empty for any), the beginning of the function's name
(empty for any), a condition on the packet, and why it is harmless. Reasons by name, since their numbers move with
every release; a name that a kernel does not have matches nothing. Source: Linux v5.17 to v6.18, the functions named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from calitrace.packet import RST, TCP

if TYPE_CHECKING:
    from calitrace.correlate.drops import Names
    from calitrace.model import Drop

_NO_REASON = ("", "NOT_SPECIFIED")


class Noise(NamedTuple):
    """A row. *only*: ``""``, ``rst`` (a TCP RST), ``no-ip`` (neither IPv4 nor IPv6)."""

    reasons: tuple[str, ...]
    function: str
    only: str
    why: str


TABLE = (
    Noise(_NO_REASON, "unix_", "", "a UNIX socket was closed with data in it"),
    Noise(_NO_REASON, "netlink_", "", "a netlink message that nobody listens to"),
    Noise(_NO_REASON, "sk_stream_kill_queues", "", "a closed TCP socket frees its queue"),
    Noise(_NO_REASON, "skb_queue_purge", "", "a closed socket frees its queue"),
    Noise(("QUEUE_PURGE",), "", "", "a closed socket or device frees its queue"),
    Noise(("UNIX_DISCONNECT", "UNIX_SKIP_OOB"), "", "", "a UNIX socket was closed with data in it"),
    Noise(("TCP_OLD_ACK", "TCP_OLD_DATA", "TCP_OLD_SEQUENCE"), "", "", "TCP had it already"),
    Noise(("TCP_ACK_UNSENT_DATA",), "tcp_", "rst", "TCP ignores a late RST"),
    Noise(("TCP_RESET", "TCP_CLOSE"), "", "", "the connection is closed"),
    Noise(_NO_REASON, "tcp_", "", "TCP frees what it has handled: ACKs, and segments of closed connections"),
    Noise(("NO_SOCKET",), "tcp_v", "rst", "a RST for a connection that is closed already"),
    Noise(("OTHERHOST",), "", "", "flooded by a switch to hosts that it is not for"),
    Noise(("PACKET_SOCK_ERROR", "SOCKET_FILTER"), "packet_rcv", "", "a packet socket's filter left it out"),
    Noise(("SOCKET_FILTER",), "raw_rcv", "", "a raw socket's filter left it out"),
    Noise(("UNHANDLED_PROTO",), "", "no-ip", "a link-layer protocol that nobody here speaks"),
    Noise(_NO_REASON, "ip6_mc_input", "", "IPv6 multicast that nobody here has joined"),
    Noise(("IPV6DISABLED",), "", "", "IPv6 is off at this interface"),
    Noise(_NO_REASON, "ndisc_", "", "a neighbour discovery message, handled"),
    Noise(_NO_REASON, "icmpv6_", "", "an ICMPv6 message, handled"),
    Noise(_NO_REASON, "igmp", "", "an IGMP message, handled"),
)


def why_harmless(drop: Drop, names: Names) -> str:
    """Why a drop is nobody's loss; empty when it may be somebody's."""
    reason, function = names.drop_reason(drop), names.symbol(drop)
    for row in TABLE:
        if reason in row.reasons and function.startswith(row.function) and _holds(row.only, drop):
            return row.why
    return ""


def _holds(only: str, drop: Drop) -> bool:
    layer = drop.packet.inner
    if only == "rst":
        return layer is not None and layer.proto == TCP and bool(layer.flags & RST)
    return only != "no-ip" or not drop.packet.layers
