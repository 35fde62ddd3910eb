"""pcap filter expressions, compiled and run by libpcap (pcap-filter(7)); no parser of our own."""

from __future__ import annotations

import ctypes
from ctypes.util import find_library

from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.packet import ip_length

DLT_RAW = 12  # packets begin with their IP header
_SNAPLEN = 262144
_NETMASK_UNKNOWN = 0xFFFFFFFF


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.POINTER(_Instruction)))


class _Header(ctypes.Structure):
    _fields_ = (
        ("seconds", ctypes.c_long),
        ("microseconds", ctypes.c_long),
        ("caplen", ctypes.c_uint32),
        ("len", ctypes.c_uint32),
    )


class Filter:
    """A compiled expression. Raises UsageError for one that libpcap does not take, EnvironmentUnfit without it."""

    def __init__(self, expression: str) -> None:
        name = find_library("pcap")
        if name is None:
            raise EnvironmentUnfit("libpcap is not there, which compiles filters", "install libpcap0.8")
        self._pcap = ctypes.CDLL(name)
        self._pcap.pcap_open_dead.restype = ctypes.c_void_p
        self._pcap.pcap_geterr.restype = ctypes.c_char_p
        handle = ctypes.c_void_p(self._pcap.pcap_open_dead(DLT_RAW, _SNAPLEN))
        self._program = _Program()
        failed = self._pcap.pcap_compile(
            handle, ctypes.byref(self._program), expression.encode(), 1, ctypes.c_uint32(_NETMASK_UNKNOWN)
        )
        cause = self._pcap.pcap_geterr(handle).decode(errors="replace") if failed else ""
        self._pcap.pcap_close(handle)
        if failed:
            raise UsageError(f"filter {expression!r}: {cause}", "the language is that of tcpdump: man pcap-filter")

    @property
    def instructions(self) -> list[tuple[int, int, int, int]]:
        """The classic BPF that libpcap made: (code, jt, jf, k)."""
        each = self._program.instructions
        return [(each[n].code, each[n].jt, each[n].jf, each[n].k) for n in range(self._program.length)]

    def matches(self, packet: bytes) -> bool:
        """Whether the expression holds for a packet that begins with its IP header, and may be cut off."""
        header = _Header(0, 0, len(packet), ip_length(packet))
        return bool(self._pcap.pcap_offline_filter(ctypes.byref(self._program), ctypes.byref(header), packet))
