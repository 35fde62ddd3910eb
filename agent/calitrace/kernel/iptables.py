"""Names of netfilter's chains, from nftables (netlink) and from the legacy tables (getsockopt); drivers of NICs.

The legacy tables are read only when the kernel has them already: asking for one would load its module.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import re
import socket
import struct
from pathlib import Path

_OWN_TABLES = ("kube-proxy", "cni_hostport")
_SOL_IP, _GET_INFO, _GET_ENTRIES = 0, 64, 65
_INFO_SIZE = 32 + 4 + 5 * 4 * 2 + 4 + 4  # struct ipt_getinfo
_ENTRIES_HEAD = 40  # struct ipt_get_entries up to its table, aligned to 8
# A chain begins with an entry whose target is ERROR and whose data is the chain's name (XT_FUNCTION_MAXNAMELEN, 30).
_CHAIN = re.compile(rb"ERROR\0{25}([\w.:-]{1,29})\0")
_SIOCETHTOOL, _GDRVINFO = 0x8946, 0x3
_libc = ctypes.CDLL(None, use_errno=True)


def chains() -> tuple[str, ...]:
    """Names of all chains, each once, in the order found. Raises OSError, NetlinkError.

    Those of kube-proxy's and the portmap plugin's own tables (their nftables modes) have names that others may have:
    they come as ``kube-proxy/services``.
    """
    from pyroute2.nftables.main import NFTables

    found: dict[str, None] = {}
    with NFTables(nfgen_family=socket.AF_INET) as tables:
        for message in tables.get_chains():
            table, name = message.get_attr("NFTA_CHAIN_TABLE"), message.get_attr("NFTA_CHAIN_NAME") or ""
            found[f"{table}/{name}" if table in _OWN_TABLES else name] = None
    names = Path("/proc/thread-self/net/ip_tables_names")
    for table in names.read_text().split() if names.exists() else ():
        found |= dict.fromkeys(_legacy(table))
    return tuple(found)


def _legacy(table: str) -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as control:
        info = _ask(control, _GET_INFO, table, _INFO_SIZE)
        (size,) = struct.unpack_from("<I", info, _INFO_SIZE - 4)
        raw = _ask(control, _GET_ENTRIES, table, _ENTRIES_HEAD + size, size)
    return [match.decode() for match in _CHAIN.findall(raw)]


def _ask(control: socket.socket, option: int, table: str, length: int, size: int = 0) -> bytes:
    buffer = ctypes.create_string_buffer(struct.pack("<32sI", table.encode(), size), length)
    there = ctypes.c_uint32(length)
    if _libc.getsockopt(control.fileno(), _SOL_IP, option, buffer, ctypes.byref(there)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buffer.raw


def driver(interface: str) -> str:
    """The driver of an interface in this thread's namespace, as ``ethtool -i`` says. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = array.array("B", struct.pack("I", _GDRVINFO).ljust(196, b"\0"))
        request = struct.pack("16sP", os.fsencode(interface), answer.buffer_info()[0])
        fcntl.ioctl(control, _SIOCETHTOOL, request.ljust(40, b"\0"))
    return answer.tobytes()[4:36].partition(b"\0")[0].decode(errors="replace")
