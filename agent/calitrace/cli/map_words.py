"""The words of a question about maps: addresses, ports, protocols and keys, and the entries that have them."""

from __future__ import annotations

import re
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

from calitrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def matches(entry: dict[str, Any], words: tuple[str, ...]) -> bool:
    """Whether each word is a value of the entry, or an address inside one of its networks."""
    return all(any(_is(value, word) for key, value in entry.items() if key != "map") for word in words)


def services(entries: list[dict[str, Any]], words: tuple[str, ...]) -> list[dict[str, Any]]:
    """The frontends that have these words, or a backend that has them, with their backends; and such backends alone."""
    asked = [entry for entry in entries if matches(entry, words)]
    having = {e["id"] for e in asked if "ordinal" in e}
    fronts = [e for e in entries if "count" in e and (e in asked or e["id"] in having)]
    wanted = {e["id"] for e in fronts} | having
    return [*fronts, *(e for e in entries if "ordinal" in e and e["id"] in wanted)]


def _is(value: object, word: str) -> bool:
    if isinstance(value, dict):
        return any(_is(each, word) for each in value.values())
    if str(value) == word or (isinstance(value, int) and word.startswith("0x") and value == _hexadecimal(word)):
        return True
    try:
        return isinstance(value, str) and "/" in value and ip_address(word) in ip_network(value, strict=False)
    except ValueError:
        return False


def any_ipv6(words: Iterable[str]) -> bool:
    """Whether what is asked for is in IPv6 maps, though nobody said -6."""
    for word in words:
        with suppress(ValueError):
            if ip_network(word, strict=False).version == 6:
                return True
    return False


def _hexadecimal(word: str) -> int:
    try:
        return int(word, 16)
    except ValueError:
        return -1


def address(text: str) -> str:
    """An address as the maps spell it. Raises UsageError when it does not parse."""
    try:
        return str(ip_address(text))
    except ValueError:
        raise UsageError(f"{text!r} is no IP address", "such as 10.96.0.10 or fd00::1") from None


def proto(word: str) -> str:
    """A protocol as the entries have it, from its name or number. Raises UsageError."""
    from calitrace.packet import PROTOCOLS
    from calitrace.report import mapdump

    if word.lower() in PROTOCOLS.values():
        return word.lower()
    if word.isdigit() and int(word) < 1 << 8:
        return mapdump.protocol(int(word))
    raise UsageError(f"{word!r} is no protocol", "tcp, udp or a number")


def iter_key_parts(word: str) -> Iterator[str]:
    """A word of a key as entries have it; ``1.2.3.4:80`` is two."""
    # A network, a number, a name (vxlan.calico, bond0.10), a MAC address.
    if "/" in word or not any(c in word for c in ".:") or re.search(r"[g-z_-]", word.lower()) or word.count(":") == 5:
        yield word
        return
    host, port = endpoint(word, port=False)
    yield host
    if port:
        yield str(port)


def endpoint(text: str, *, port: bool) -> tuple[str, int]:
    """``1.2.3.4:80``, ``[fd00::1]:80`` or, unless a *port* is needed, an address alone."""
    host, _, number = text.rpartition(":") if ("]:" in text or text.count(":") == 1) else (text, "", "")
    if port and not number:
        raise UsageError(f"{text!r} has no port", "such as 10.10.0.1:30080/tcp or [fd00::1]:80/udp")
    if number and not (number.isdigit() and int(number) < 1 << 16):
        raise UsageError(f"{number!r} is no port", "a number from 0 to 65535")
    return address(host.strip("[]")), int(number or 0)
