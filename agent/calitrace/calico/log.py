"""Calico's debug log, line by line: prefix, message, and what is not Calico's.

A program prints ``[IPv6 ]TAG-D: MESSAGE``. TAG is the interface's name padded with ``-``: cut to 8 characters up to
v3.24, padded to 15 since v3.25. D is Calico's *policy* direction, which on a workload interface is the opposite of
the tc hook: I into the endpoint, E out of it, X XDP, C connect-time (old). Source: felix/bpf-gpl/log.h of
v3.13 to master. Preamble programs and a few more print without a tag.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from calitrace.calico import WORKLOAD_PREFIX, messages, trace
from calitrace.calico.trace import Context

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from calitrace.calico.messages import Message
    from calitrace.model import LogLine

K = TypeVar("K")
V = TypeVar("V")
_OLD_WIDTH = 8
_TAG = re.compile(
    r"(?P<ipv6>IPv6 )?(?:(?P<name>[^ :]{1,16})-(?P<direction>[IEXC])|(?P<other>CTLB|CTLB-V46|CTLB-V6|CT-CLEANER)-+)"
)
_PASTED = re.compile(rf"(?:.*?\s)??(?P<tag>{_TAG.pattern}): (?P<text>.*)", re.DOTALL)
_PRINTK_WIDTH = len(trace.PRINTK)
_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"000000000")
_CACHED = 1 << 16  # entries; a cache that is full is begun anew


class Form(Enum):
    """What a line is. UNKNOWN bears Calico's tag, and a message that stands in no table."""

    CALICO = "calico"
    UNKNOWN = "unknown"
    OTHER = "other"
    LOST = "lost"
    BLANK = "blank"

    __hash__ = object.__hash__  # Enum's own is Python, and every line is counted


@dataclass(frozen=True, slots=True)
class Tag:
    """Who printed. *interface* may be *cut* to 8 characters, as v3.13 to v3.24 (*old*) do.

    *direction*: I, E or X; empty for a *program* without interface: ``CTLB`` (connect-time), ``CT-CLEANER``.
    *workload*: it is a pod's interface.
    """

    interface: str
    direction: str
    ipv6: bool = False
    cut: bool = False
    old: bool = False
    program: str = ""
    workload: bool = False

    @property
    def hook(self) -> str:
        """The hook in the kernel's words: ingress, egress, xdp; empty where there is none."""
        if self.direction == "X":
            return "xdp"
        if not self.direction:
            return ""
        return "egress" if (self.direction == "I") == self.workload else "ingress"

    def is_of(self, interface: str) -> bool:
        """Whether the program may sit on *interface*: a cut name stands for all that begin so."""
        return interface.startswith(self.interface) if self.cut else interface == self.interface


def tag(text: str, prefixes: tuple[str, ...] = (WORKLOAD_PREFIX,)) -> Tag | None:
    """The parts of what stands before the first ``": "``, or None when it is no tag of Calico's.

    *prefixes*: how the names of pods' interfaces begin.
    """
    found = _TAG.fullmatch(text)
    if found is None:
        return None
    if found["other"] or found["direction"] == "C":  # up to v3.24 CTLB is CALI-C
        return Tag("", "", bool(found["ipv6"]), program=found["other"] or "CTLB")
    padded = found["name"]
    old = len(padded) == _OLD_WIDTH
    return Tag(
        padded.rstrip("-"),
        found["direction"],
        bool(found["ipv6"]),
        old and padded[-1] != "-",
        old,
        workload=padded.startswith(prefixes),
    )


class Printed(NamedTuple):
    """What a program printed. *text*: the message after the tag, or all of it where there is no tag."""

    tag: Tag | None
    text: str
    message: Message | None
    form: Form


class Line(NamedTuple):
    """One line. *raw*: as it came; *ktime_ns*: CLOCK_MONOTONIC, of a line whose header the kernel gave in numbers."""

    raw: str
    context: Context
    printed: Printed
    ktime_ns: int = 0

    @property
    def tag(self) -> Tag | None:
        """Who printed it."""
        return self.printed.tag

    @property
    def text(self) -> str:
        """The message."""
        return self.printed.text

    @property
    def message(self) -> Message | None:
        """Its place in the table of messages."""
        return self.printed.message

    @property
    def form(self) -> Form:
        """What kind of line it is."""
        return self.printed.form

    @property
    def time_ns(self) -> int:
        """Nanoseconds of the clock that the line was stamped with; 0 where there is no stamp."""
        return self.ktime_ns or trace.time_ns(self.raw)

    def fields(self) -> dict[str, str]:
        """The values in the message, by the names in its template; none for an unknown one."""
        found = messages.pattern(self.message).fullmatch(self.text) if self.message else None
        return found.groupdict() if found else {}


# Every other line of programs up to v3.29, whose messages bring a newline of their own.
_EMPTY = Line("", trace.UNKNOWN, Printed(None, "", None, Form.BLANK))


class Reader:
    """Turns text into lines, and counts them by their form. All that it is given comes out again, in order.

    *prefixes*: how the names of pods' interfaces begin; what is added counts for lines read from then on.
    """

    def __init__(self, prefixes: tuple[str, ...] = (WORKLOAD_PREFIX,)) -> None:
        self.prefixes = prefixes
        self.counts: Counter[Form] = Counter()
        self.events_lost = 0  # by what the kernel says in the text itself; a place of unknown size counts as one
        self._contexts: dict[str, Context] = {}  # by what stands before the time
        self._before, self._behind = slice(0), slice(0, None)  # the time, where it stood in the last line split
        self._behind_time: dict[str, Printed] = {}
        self._tasks: dict[tuple[str, int, int], Context] = {}
        self._printed: dict[str, Printed] = {}
        self._tags: dict[str, Tag] = {}
        self._shapes: dict[bytes, Message] = {}

    @property
    def total(self) -> int:
        """Lines read so far."""
        return self.counts.total()

    def read(self, raw: Iterable[str]) -> Generator[Line, None, None]:
        """The lines of a trace_pipe, a log file or a paste; each without its newline."""
        contexts, known, new = self._contexts, self._behind_time, tuple.__new__
        calico, known_form = 0, Form.CALICO
        last, context = "", None  # what stood before the time, and what it says
        try:
            for line in raw:
                # The common case: the header of a line before, but for its time. All else takes the slow way.
                if (before := line[self._before]) != last:
                    last, context = before, contexts.get(before)
                rest = line[self._behind]
                if context is not None and (printed := known.get(rest) or self._print_behind_time(rest)):
                    result = new(Line, (line, context, printed, 0))
                else:
                    result = self._slow(line)
                    last, context = "", None
                if result[2][3] is known_form:
                    calico += 1
                else:
                    self.counts[result.form] += 1
                yield result
        finally:
            self.counts[known_form] += calico

    def line(self, event: LogLine) -> Line:
        """A line whose header the kernel gave in numbers."""
        who = event.comm, event.pid, event.cpu
        context = self._tasks.get(who)
        if context is None:
            context = Context(*who)
            _remember(self._tasks, who, context)
        raw = event.text
        text = raw.rstrip("\n")  # which programs up to v3.29 print
        printed = self._printed.get(text)
        if printed is None:
            printed = self._print(text)
            _remember(self._printed, text, printed)
        self.counts[printed.form] += 1
        return Line(raw, context, printed, event.ktime_ns)

    def lines(self, event: LogLine) -> tuple[Line, ...]:
        """The same behind the place where lines of its CPU are missing, if there is one."""
        return (self.lost(event), self.line(event)) if event.lost else (self.line(event),)

    @staticmethod
    def lost(event: LogLine) -> Line:
        """The place before *event* where lines of its CPU are missing, in the kernel's words. It is no line."""
        raw = f"CPU:{event.cpu} [LOST {event.lost} EVENTS]"
        return Line(raw, trace.UNKNOWN, Printed(None, raw, None, Form.LOST), event.ktime_ns)

    def _slow(self, raw: str) -> Line:
        if not raw:
            return _EMPTY
        if raw.isspace():
            return Line(raw, trace.UNKNOWN, Printed(None, raw, None, Form.BLANK))
        if raw.startswith("#"):  # the kernel's own comments, and people's
            return Line(raw, trace.UNKNOWN, Printed(None, raw, None, Form.OTHER))
        if lost := trace.lost(raw):
            self.events_lost += lost.count or 1
            return Line(raw, trace.UNKNOWN, Printed(None, raw, None, Form.LOST))
        context, stamp, text = trace.split(raw)
        behind = f"{trace.PRINTK}{text}"  # not in a line of Docker's, which goes on behind its text
        if context.cpu >= 0 and raw.endswith(f"{stamp}{behind}"):
            at = len(raw) - len(behind)
            self._before, self._behind = slice(at - len(stamp)), slice(at, None)
            _remember(self._contexts, raw[self._before], context)
        text = text.rstrip("\r\n")
        printed = self._print(text)
        if printed.form is Form.OTHER and context is trace.UNKNOWN and (pasted := _PASTED.fullmatch(text)):
            printed = self._print(f"{pasted['tag']}: {pasted['text']}")
        return Line(raw, context, printed)

    def _print_behind_time(self, rest: str) -> Printed | None:
        if not rest.startswith(trace.PRINTK):
            return None
        printed = self._print(rest[_PRINTK_WIDTH:].rstrip("\r\n"))
        _remember(self._behind_time, rest, printed)
        return printed

    def _print(self, text: str) -> Printed:
        before, colon, message_text = text.partition(": ")
        found = self._tags.get(before)
        if found is None:
            found = tag(before, self.prefixes) if colon else None
            if found is None:
                untagged = messages.classify_untagged(text)
                return Printed(None, text, untagged, Form.CALICO if untagged else Form.OTHER)
            _remember(self._tags, before, found)
        # What messages of one template share, but for hexadecimal letters and the length of numbers. (str.translate,
        # and bytes.translate that deletes, are slow.) IPv4 and IPv6 are the digits that tell templates apart.
        shape = message_text.replace("v6", "v?").encode(errors="surrogatepass").translate(_DIGITS_ALIKE)
        message = self._shapes.get(shape)
        if message is None:
            message = messages.classify(message_text)
            if message is None:
                return Printed(found, message_text, None, Form.UNKNOWN)
            _remember(self._shapes, shape, message)
        return Printed(found, message_text, message, Form.CALICO)


def _remember(cache: dict[K, V], key: K, value: V) -> None:
    if len(cache) >= _CACHED:
        cache.clear()
    cache[key] = value
