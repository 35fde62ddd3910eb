"""Send probes at a rate, hear what comes back, and say what became of each.

A probe has a source port of its own (the port is bound, so no other process's traffic is touched), so that each is
a new flow and every backend has its turn. TCP: one SYN is one probe. A SYN-ACK answers it; we send a RST at once,
and for unanswered ones at their deadline, because the far side may hold a half-open connection whose SYN-ACK was
lost (our kernel sends a RST too, but firewalls often drop that one; a second RST is ignored). UDP: an echoed
identity, or any datagram to the probe's port, answers it. An ICMP error or a RST refuses it.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import os
import random
import selectors
import socket
import struct
import time
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calitrace import identity
from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import netns
from calitrace.model import Outcome, Probe
from calitrace.packet import RST, SYN, TCP, UDP, dissect
from calitrace.probes.template import Flow, Template

if TYPE_CHECKING:
    from collections.abc import Callable

    from calitrace.packet import Layer, Packet

_log = logging.getLogger(__name__)
MAX_RATE = 1000  # probes a second: this is a probe, no load generator
MAX_COUNT = 100_000
MAX_TIMEOUT_S = 3600
_PORTS = 256  # at most; probes cycle through them
_CATCH_UP_S = 0.02  # a sender that was held up longer than this does not make up for it in a burst
_SO_ATTACH_FILTER, _SO_MEMINFO = 26, 55
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3  # include/uapi/linux/in.h
_RECEIVE_BYTES = 1 << 20
_STOPPED = "the run was stopped before its time was up"


@dataclass(frozen=True)
class Settings:
    """*namespace*: where probes come from, "" for ours. *rate*: a second. *timeout_s*: for each probe.

    *tunnel*: (address of the node, UDP port, VNI) to send inside VXLAN, else None.
    """

    host: str
    port: int
    proto: int
    count: int = 5
    rate: float = 10
    size: int = 0
    namespace: str = ""
    timeout_s: float = 1
    tunnel: tuple[str, int, int] | None = None


class ProbeRun:
    """One run. ``with`` it; prepare is done on entry, so that a tracer knows *src*, *ports* and *run_id*."""

    def __init__(self, settings: Settings) -> None:
        if not 1 <= settings.count <= MAX_COUNT:
            raise UsageError(f"the count must be 1 to {MAX_COUNT}")
        if not 0 < settings.rate <= MAX_RATE:
            raise UsageError(f"the rate must be above 0 and at most {MAX_RATE} a second")
        if not 0 <= settings.timeout_s <= MAX_TIMEOUT_S:
            raise UsageError(f"the timeout must be 0 to {MAX_TIMEOUT_S} seconds")
        self.settings = settings
        self.run_id = int.from_bytes(os.urandom(4), "big") or 1
        self.src = ""
        self.ports = (0, 0)
        self.duplicates = 0
        self._late: set[int] = set()
        self.probes: dict[int, Probe] = {}
        self._open: dict[int, None] = {}  # in the order in which they were sent
        self._by_port: dict[int, int] = {}
        self._sockets: list[socket.socket] = []
        self._bound: list[socket.socket] = []
        self._stopped = False
        self._dst = _address(settings.host)
        # Where the packets go on the wire: the node, when they are tunnelled.
        self._next = self._dst
        if settings.tunnel:
            node, port, vni = settings.tunnel
            if not 0 < port < 1 << 16 or not 0 <= vni < 1 << 24:
                raise UsageError("a UDP port has 16 bits, and a VNI 24")
            self._next = _address(node)

    def __enter__(self) -> ProbeRun:
        try:
            with netns.inside(self.settings.namespace):
                self._prepare()
        except PermissionError:
            self.__exit__()
            raise EnvironmentUnfit("raw sockets are refused", "run as root or with CAP_NET_RAW") from None
        except OSError as failure:
            self.__exit__()
            raise EnvironmentUnfit(f"cannot prepare probes: {failure.strerror}") from failure
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for each in (*self._sockets, *self._bound):
            each.close()
        self._sockets, self._bound = [], []

    def stop(self) -> None:
        """End the run at the next step; probes on their way stay open."""
        self._stopped = True
        if self._sockets:
            # select(2) is resumed after a signal: only a readable socket ends it.
            self._wake.send(b"\0")

    def _prepare(self) -> None:
        settings = self.settings
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            try:
                route.connect((self._next, 9))
            except OSError as failure:  # EACCES is a route of type prohibit, or a broadcast address
                raise EnvironmentUnfit(
                    f"cannot reach {self._next} from {settings.namespace or 'this namespace'}: {failure.strerror}",
                    "check the address and the routes there",
                ) from failure
            self.src = route.getsockname()[0]
        self._wake, self._woken = socket.socketpair()
        self._sockets += [self._wake, self._woken]
        self._bind()
        self._out = self._raw(socket.IPPROTO_RAW)
        # Each probe finds the path's MTU by itself: what an earlier one was told must not hold the next one back.
        self._out.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        low, high = self.ports
        self._hear: list[socket.socket] = []
        if settings.proto == TCP:
            hear = self._raw(socket.IPPROTO_TCP)
            _attach_filter(hear, _tcp_filter(self._dst, low, high))
            self._hear.append(hear)
        errors = self._raw(socket.IPPROTO_ICMP)
        _attach_filter(errors, _icmp_filter(self._dst, settings.proto, settings.port, low, high))
        self._hear.append(errors)
        tunnel = None
        if settings.tunnel:
            _, port, vni = settings.tunnel
            node = self._next
            tunnel = (self.src, node, port, vni)
            outer_errors = self._raw(socket.IPPROTO_ICMP)
            _attach_filter(outer_errors, _icmp_filter(node, UDP, port, 0, 0xFFFF))
            self._hear.append(outer_errors)
            # Replies come back in the tunnel: the tap sees them before any tc program takes them.
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
            _attach_filter(tap, _vxlan_filter(node, port))
            self._sockets.append(tap)
            self._hear.append(tap)
        if settings.proto == UDP:
            self._hear += self._bound
        flow = Flow(settings.proto, self.src, self._dst, settings.port, settings.size, tunnel)
        self._template = Template(flow, self.run_id)
        for each in self._hear:
            each.setblocking(False)

    def _raw(self, proto: int) -> socket.socket:
        found = socket.socket(socket.AF_INET, socket.SOCK_RAW, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        self._sockets.append(found)
        return found

    def _bind(self) -> None:
        """Take a block of consecutive free ports, so that the kernel-side filter is a range."""
        kind = socket.SOCK_STREAM if self.settings.proto == TCP else socket.SOCK_DGRAM
        wanted = min(self.settings.count, _PORTS)
        for _ in range(100):
            low = random.randrange(33000, 60000 - wanted)
            block: list[socket.socket] = []
            try:
                for port in range(low, low + wanted):
                    block.append(socket.socket(socket.AF_INET, kind))
                    block[-1].bind((self.src, port))
            except OSError as failure:
                for each in block:
                    each.close()
                if failure.errno != errno.EADDRINUSE:
                    raise
                continue
            self._bound = block
            self.ports = (low, low + wanted - 1)
            return
        raise EnvironmentUnfit(f"no {wanted} free consecutive ports at {self.src}", "probe with a smaller -c")

    def run(
        self,
        on_done: Callable[[Probe], None] = lambda probe: None,
        on_sent: Callable[[Probe], None] = lambda probe: None,
    ) -> list[Probe]:
        """Send all, wait for answers.

        *on_sent* is called with each probe as it leaves, *on_done* when its outcome is known. Returns all probes
        that were sent, by number.
        """
        self._on_done = on_done
        try:
            self._loop(on_sent)
        finally:
            for number in self._open:
                self._reset(number)
        for number in self._open:
            self.probes[number] = replace(self.probes[number], detail=_STOPPED)
            self._on_done(self.probes[number])
        self._open.clear()
        return [self.probes[number] for number in sorted(self.probes)]

    def _loop(self, on_sent: Callable[[Probe], None]) -> None:
        gap = 1 / self.settings.rate
        count, sent = self.settings.count, 0
        due = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for each in (*self._hear, self._woken):
                selector.register(each, selectors.EVENT_READ)
            while not self._stopped and (sent < count or self._open):
                now = time.monotonic()
                if sent < count and now >= due:
                    self._send(sent, on_sent)
                    sent += 1
                    due = max(due + gap, now - _CATCH_UP_S)
                deadline = self._deadline()
                wake = min(due if sent < count else math.inf, deadline)
                if wake == math.inf:
                    continue
                ready = selector.select(max(wake - time.monotonic(), 0))
                for key, _ in ready:
                    if key.fileobj is not self._woken:
                        self._receive(key.fileobj)  # type: ignore[arg-type]
                # Expire only what was still unanswered once our sockets were empty.
                if not ready and time.monotonic() >= deadline:
                    self._expire(next(iter(self._open)))

    def _deadline(self) -> float:
        """When the oldest probe without an answer is given up."""
        oldest = next(iter(self._open), None)
        return math.inf if oldest is None else self.probes[oldest].sent_ns / 1e9 + self.settings.timeout_s

    def _expire(self, number: int) -> None:
        del self._open[number]
        self._reset(number)
        self.probes[number] = replace(self.probes[number], outcome=Outcome.UNANSWERED)
        self._on_done(self.probes[number])

    @property
    def late(self) -> int:
        """Probes whose reply came after their deadline: they stay unanswered."""
        return len(self._late)

    def own_losses(self) -> int:
        """Packets that our own sockets dropped because we were slow: never losses of the network."""
        return sum(_socket_drops(each) for each in self._hear)

    def _send(self, number: int, on_sent: Callable[[Probe], None]) -> None:
        settings = self.settings
        sport = self.ports[0] + number % (self.ports[1] - self.ports[0] + 1)
        packet = self._template.request(number, sport)
        sent_ns = time.monotonic_ns()
        probe = Probe(
            number,
            settings.proto,
            self.src,
            sport,
            self._dst,
            settings.port,
            sent_ns,
            len(packet),
            Outcome.OPEN,
        )
        self._by_port[sport] = number
        try:
            self._out.sendto(packet, (self._next, 0))
        except OSError as failure:
            self.probes[number] = replace(probe, outcome=Outcome.SEND_ERROR, detail=failure.strerror or "?")
            self._on_done(self.probes[number])
            return
        self.probes[number] = probe
        self._open[number] = None
        on_sent(probe)

    def _receive(self, source: socket.socket) -> None:
        """Take all that one socket has."""
        while True:
            now = time.monotonic_ns()
            try:
                raw, sender = source.recvfrom(65535)
            except BlockingIOError:
                return
            except OSError as failure:  # an ICMP error came for a bound UDP port; the raw socket has it whole
                if failure.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EMSGSIZE):
                    continue
                raise
            if source in self._bound:
                found = identity.decode(raw)
                ours = found is not None and found.run_id == self.run_id
                number = found.sequence if found and ours else self._by_port.get(source.getsockname()[1])
                if sender[0] == self._dst or ours:
                    self._done(number, Outcome.ANSWERED, now)
                continue
            self._packet(raw, now)

    def _packet(self, raw: bytes, now: int) -> None:
        port = self.settings.tunnel[1] if self.settings.tunnel else 4789
        packet = dissect(raw, port)
        layer = packet.inner
        if layer is None:
            return
        if layer.is_icmp_error:
            self._done(self._quoted(packet), Outcome.REFUSED, now, layer.refusal)
        elif layer.proto == TCP and layer.flags & RST:
            self._done(self._number(layer), Outcome.REFUSED, now, layer.refusal)
        elif layer.proto == TCP and layer.flags & SYN:
            number = self._number(layer)
            self._done(number, Outcome.ANSWERED, now)
            if number is not None:
                self._reset(number)
        elif layer.proto == UDP and str(layer.dst) == self.src:
            self._done(self._number(layer), Outcome.ANSWERED, now)

    def _quoted(self, packet: Packet) -> int | None:
        """The probe that an ICMP error is about: it may quote no more than the ports of a tunnel's packet."""
        quoted = packet.quoted
        if quoted is None or packet.tunnel or not self.settings.tunnel or quoted.dport != self.settings.tunnel[1]:
            return self._number(quoted)
        inner = self._number(packet.layers[2]) if len(packet.layers) > 2 else None
        return self._by_port.get(self._template.inner_port(quoted.sport)) if inner is None else inner

    def _number(self, layer: Layer | None) -> int | None:
        if layer is None:
            return None
        if layer.identity is not None:
            return layer.identity.sequence if layer.identity.run_id == self.run_id else None
        if layer.proto == TCP:
            # A RST acknowledges the data in a SYN too, a SYN-ACK does not.
            for sequence in (layer.ack - 1, layer.ack - 1 - self.settings.size, layer.seq):
                number = identity.tcp_number(sequence & 0xFFFFFFFF, self.run_id)
                probe = self.probes.get(number) if number is not None else None
                if probe is not None and probe.sport in (layer.sport, layer.dport):
                    return number
            return None
        return self._by_port.get(layer.sport if str(layer.src) == self.src else layer.dport)

    def _done(self, number: int | None, outcome: Outcome, now: int, detail: str = "") -> None:
        probe = self.probes.get(number) if number is not None else None
        if number is None or probe is None:
            return
        if number not in self._open:
            if probe.outcome is Outcome.UNANSWERED and number not in self._late:
                self._late.add(number)
            else:
                self.duplicates += 1
            return
        del self._open[number]
        self.probes[number] = replace(probe, outcome=outcome, rtt_ns=now - probe.sent_ns, detail=detail)
        self._on_done(self.probes[number])

    def _reset(self, number: int) -> None:
        if self.settings.proto != TCP:
            return
        packet = self._template.reset(number, self.probes[number].sport)
        try:
            self._out.sendto(packet, (self._next, 0))
        except OSError as failure:  # the route or the interface has gone, or a firewall of ours refuses
            _log.info("no RST after probe %d: %s", number, failure.strerror)


def _address(host: str) -> str:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        try:
            return socket.gethostbyname(host)
        except OSError as failure:
            raise UsageError(f"no address for {host!r}: {failure.strerror}") from failure
        except UnicodeError as failure:  # an empty label, or one of more than 63 characters
            raise UsageError(f"{host!r} is no host name") from failure
    if found.version != 4:
        raise UsageError(f"{host} is IPv6", "probes are IPv4 so far")
    if found.is_unspecified or found.is_multicast:
        raise UsageError(f"{host} is not the address of one machine")
    return str(found)


# Classic BPF: (code, jump if true, jump if false, constant). linux/filter.h; offsets from the IP header.
_LDX_IHL, _LD_H_X, _LD_B_X, _LD_W_X, _LD_W, _LD_B = 0xB1, 0x48, 0x50, 0x40, 0x20, 0x30
_JEQ, _JGE, _JGT, _RET = 0x15, 0x35, 0x25, 0x06
_Filter = tuple[tuple[int, int, int, int], ...]


def _ip(address: str) -> int:
    return int(ipaddress.IPv4Address(address))


def _tcp_filter(target: str, low: int, high: int) -> _Filter:
    return (
        (_LD_W, 0, 0, 12),
        (_JEQ, 0, 5, _ip(target)),
        (_LDX_IHL, 0, 0, 0),
        (_LD_H_X, 0, 0, 2),
        (_JGE, 0, 2, low),
        (_JGT, 1, 0, high),
        (_RET, 0, 0, 0xFFFF),
        (_RET, 0, 0, 0),
    )


def _icmp_filter(target: str, proto: int, port: int, low: int, high: int) -> _Filter:
    """Errors that quote a packet of ours: it has no IP options, so its ports stand 28 bytes into the message."""
    return (
        (_LDX_IHL, 0, 0, 0),
        (_LD_W_X, 0, 0, 8 + 16),
        (_JEQ, 0, 8, _ip(target)),
        (_LD_B_X, 0, 0, 8 + 9),
        (_JEQ, 0, 6, proto),
        (_LD_H_X, 0, 0, 8 + 22),
        (_JEQ, 0, 4, port),
        (_LD_H_X, 0, 0, 8 + 20),
        (_JGE, 0, 2, low),
        (_JGT, 1, 0, high),
        (_RET, 0, 0, 0xFFFF),
        (_RET, 0, 0, 0),
    )


def _vxlan_filter(node: str, port: int) -> _Filter:
    return (
        (_LD_W, 0, 0, 12),
        (_JEQ, 0, 6, _ip(node)),
        (_LD_B, 0, 0, 9),
        (_JEQ, 0, 4, UDP),
        (_LDX_IHL, 0, 0, 0),
        (_LD_H_X, 0, 0, 2),
        (_JEQ, 0, 1, port),
        (_RET, 0, 0, 0xFFFF),
        (_RET, 0, 0, 0),
    )


def _attach_filter(target: socket.socket, instructions: _Filter) -> None:
    """Let the kernel drop what is not for us. Raises OSError when it refuses the program."""
    code = array("B", b"".join(struct.pack("HBBI", *each) for each in instructions))
    address, _ = code.buffer_info()
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(instructions), address))


def _socket_drops(target: socket.socket) -> int:
    """Packets the kernel dropped at a full receive buffer: SK_MEMINFO_DROPS."""
    drops: int = struct.unpack("9I", target.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[8]
    return drops
