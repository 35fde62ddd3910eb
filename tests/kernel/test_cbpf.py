"""Filters as C in a program of ours, beside libpcap's own run of the same expression on the same packets."""

from __future__ import annotations

import ctypes
import random
import struct

import pytest

from calitrace.cbpf import c_function
from calitrace.events import CAPTURE_BYTES
from calitrace.kernel import loader, syscall
from calitrace.kernel.pcap import Filter
from calitrace.packet import ip_length

pytestmark = pytest.mark.root

EXPRESSIONS = (
    "tcp",
    "udp port 53",
    "host 10.0.0.1 and port 80",
    "tcp[tcpflags] & (tcp-syn|tcp-rst) != 0",
    "ip[6:2] & 0x1fff = 0",
    "icmp or icmp6",
    "ip6 and tcp port 443",
    "greater 100",
    "len <= 60 or len = 77",
    "net 10.0.0.0/8 and not port 22",
    "udp[8:4] & 0xff = 7",
    "ip[2:2] % 3 = 1 or ip[8] / 7 * 2 - 1 > 10",
    "tcp[4:4] ^ 5 > 0x70000000 and ip[1] << 3 >= ip[8] >> 2",
    "ip[2:2] / (ip[1] & 1) > 20",
    "src portrange 1000-2000 or dst port 80",
    "ip[0:2] = tcp[ip[3]:2] or -ip[9] = 4294967279",
    "ip proto 47 or ip6 proto 47",
)
SOURCE = """
struct result { u64 matched; };
BPF_ARRAY(packets, struct sample, 1);
BPF_ARRAY(results, u64, 1);
int run(struct __sk_buff *skb)
{
	u32 zero = 0;
	struct sample *s = packets.lookup(&zero);
	u64 *result = results.lookup(&zero), all = 0;
	u32 bytes;

	if (!s || !result)
		return 0;
	bytes = s->bytes;
	if (bytes > CAPTURE_BYTES)
		return 0;
CALLS
	*result = all;
	return 0;
}
"""


def packet(chance: random.Random) -> bytes:
    """A packet that some of the expressions hold for, or garbage, cut off somewhere."""
    ports = struct.pack("!HH", *(chance.choice((22, 53, 80, 443, 1500, 40000)) for _ in range(2)))
    rest = ports + chance.randbytes(8) + bytes((0x50, chance.choice((2, 4, 16, 18)))) + chance.randbytes(60)
    protocol, tail = chance.choice((1, 6, 6, 17, 17, 47, 58)), rest[: chance.randrange(4, len(rest))]
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, CAPTURE_BYTES))
    if kind < 3:
        head = struct.pack("!IHBB", 6 << 28, len(tail), protocol, 64) + chance.randbytes(32)
    else:
        source, target = (chance.choice((b"\x0a\0\0\x01", b"\x0a\0\0\x02", b"\xc0\0\x02\x01")) for _ in range(2))
        options = 4 * chance.choice((0, 0, 0, 2))
        fragment = chance.choice((0, 0, 0, 0x2000, 185))
        fields = (0x45 + options // 4, chance.randrange(256), 20 + options + len(tail), 0, fragment)
        head = struct.pack("!BBHHHBBH", *fields, chance.randrange(256), protocol, 0)
        head += source + target + bytes(options)
    return (head + tail)[: chance.choice((CAPTURE_BYTES, CAPTURE_BYTES, chance.randrange(1, 60)))]


def test_a_filter_in_the_kernel_is_libpcaps() -> None:
    filters = [Filter(each) for each in EXPRESSIONS]
    window = loader.bpf_source("include/events.h") + loader.bpf_source("include/packet.h")
    helpers = window[window.index("static __always_inline u32 be16_at") : window.index("/*\n * A wake-up costs")]
    calls = "".join(
        f"\tif (pcap_{n}(&s->window, bytes, s->length))\n\t\tall |= 1ULL << {n};\n" for n in range(len(filters))
    )
    text = f"#define CAPTURE_BYTES {CAPTURE_BYTES}\nstruct window {{ u8 bytes[{CAPTURE_BYTES + 64}]; }};\n"
    text += "struct sample { struct window window; u32 bytes; u32 length; };\n" + helpers
    text += "".join(c_function(f"pcap_{n}", each.instructions) for n, each in enumerate(filters))
    program = loader.compile_bpf(text + SOURCE.replace("CALLS", calls), defines={})
    function = program.load_func(b"run", program.SCHED_CLS)
    chance, matched = random.Random(1), [0] * len(filters)
    try:
        for _ in range(2000):
            raw = packet(chance)
            sample = raw.ljust(CAPTURE_BYTES + 64, b"\0") + struct.pack("=II", len(raw), ip_length(raw))
            syscall.map_update(program[b"packets"].map_fd, bytes(4), sample)
            run(function.fd)
            (found,) = struct.unpack("=Q", syscall.map_lookup(program[b"results"].map_fd, bytes(4), 8) or b"")
            for n, each in enumerate(filters):
                assert bool(found >> n & 1) == each.matches(raw), (EXPRESSIONS[n], raw.hex())
                matched[n] += found >> n & 1
    finally:
        program.cleanup()
    assert all(0 < each < 2000 for each in matched), dict(zip(EXPRESSIONS, matched, strict=True))


def run(program: int) -> None:
    """Run a tc program once, on an empty Ethernet frame (BPF_PROG_TEST_RUN)."""
    frame = ctypes.create_string_buffer(64)
    attr = syscall.Attr()
    attr.u32[0], attr.u32[2] = program, len(frame)
    attr.u64[2] = ctypes.addressof(frame)
    syscall.call(10, attr)
