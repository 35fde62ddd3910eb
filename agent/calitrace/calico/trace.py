"""A line of the kernel's trace_pipe: who printed, where, when, and the text.

``%16s-%-7d [%03d] FLAGS %5lu.%06lu: FUNCTION: TEXT``, Linux kernel/trace/trace_output.c. Since Linux v5.9
bpf_trace_printk is a trace event of that name; before, FUNCTION is ``0`` or ``0x00000001``. FLAGS are 4 characters,
5 since v5.15, more with PREEMPT_RT; ``record-tgid`` adds a column. Lines that people paste have lost their header, or
have gained a prefix: a container log's time, a file name, an editor's line number.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

PRINTK = ": bpf_trace_printk: "  # what stands between header and text in all but old kernels
_COMM_WIDTH = 16  # a task's name has at most 15 characters: whole, the column begins with a blank
_HEADER = re.compile(
    r"(?P<left>.*?)-(?P<pid>\d{1,7})\s+(?:\(\s*(?P<tgid>\d+|-+)\)\s+)?\[(?P<cpu>\d{3,})\]"
    r"(?:\s+(?P<flags>[^\s:]{4,7}))?\s+(?P<stamp>\d+(?:\.\d+)?): +(?P<function>[^\s:]+):(?: (?P<text>.*))?",
    re.DOTALL,
)
_CUT_HEADER = re.compile(r".*?(?P<stamp>\d+\.\d{6})?(?:: |\s|^)bpf_trace_printk: (?P<text>.*)", re.DOTALL)
_LOST = re.compile(r"\s*CPU:(?P<cpu>\d+) \[LOST (?:(?P<count>\d+) )?EVENTS\]\s*")
_LINE_NUMBER = re.compile(r"\s*\d+(?:[:|\t]|\s\s)\s*")


@dataclass(frozen=True, slots=True)
class Context:
    """The task in whose context a program printed. *cpu*: -1 where the header was cut off.

    *comm*: may hold blanks, dashes and colons; ``<idle>``, or ``<...>`` where the kernel had forgotten it.
    *before*: what stood in front of the header in a pasted line.
    """

    comm: str = ""
    pid: int = 0
    cpu: int = -1
    tgid: int | None = None
    flags: str = ""
    function: str = ""
    before: str = ""


UNKNOWN = Context()


@dataclass(frozen=True, slots=True)
class Lost:
    """The kernel's own word for a buffer that ran over. *count* is None where it does not say how many."""

    cpu: int
    count: int | None


def lost(line: str) -> Lost | None:
    """``CPU:3 [LOST 2345 EVENTS]``, or None."""
    found = _LOST.fullmatch(line)
    return Lost(int(found["cpu"]), int(found["count"]) if found["count"] else None) if found else None


def split(line: str) -> tuple[Context, str, str]:
    """(context, time as printed or empty, text). A line without a header comes back whole, of context UNKNOWN."""
    if line.startswith('{"log":'):
        line = _docker(line)
    found = _HEADER.fullmatch(line)
    if found is None:
        cut = _CUT_HEADER.fullmatch(line)
        return (UNKNOWN, cut["stamp"] or "", cut["text"]) if cut else (UNKNOWN, "", line)
    before, comm = _comm(found["left"])
    tgid = found["tgid"]
    return (
        Context(
            comm,
            int(found["pid"]),
            int(found["cpu"]),
            int(tgid) if tgid and tgid.isdecimal() else None,
            found["flags"] or "",
            found["function"],
            before,
        ),
        found["stamp"],
        found["text"] or "",
    )


def _comm(left: str) -> tuple[str, str]:
    """(what stands before, name of the task) of what precedes ``-PID``."""
    column = left[-_COMM_WIDTH:]
    if len(left) >= _COMM_WIDTH and column.startswith(" "):
        return left[:-_COMM_WIDTH].strip(), column.strip()
    number = _LINE_NUMBER.match(left)
    if number:
        return left[: number.end()].strip(), left[number.end() :].strip()
    if len(left) < _COMM_WIDTH:
        return "", left.strip()
    before, _, comm = left.rpartition(" ")  # the padding is gone, and something stands in front
    return before.strip(), comm


def _docker(line: str) -> str:
    """The text of a line of Docker's json-file log driver."""
    try:
        text = json.loads(line)["log"]
    except (ValueError, KeyError):
        return line
    return text.rstrip("\n") if isinstance(text, str) else line


def time_ns(line: str) -> int:
    """Nanoseconds of the time in a line's header (of a clock of its own: not wall time); 0 where there is none."""
    _, stamp, _ = split(line)
    seconds, _, fraction = stamp.partition(".")
    return int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0")[:9]) if stamp else 0
