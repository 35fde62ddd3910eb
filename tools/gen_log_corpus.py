"""Write tests/data/log/ERA.tsv: every message of an era as its programs print it, below headers of many kernels.

Each line is the template that it must be recognised as, a tab, and the line. With --check nothing is written: exit
status 1 says that the committed corpus is another.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

from calitrace.calico.messages import MESSAGES, Message, render

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "log"
ERAS = {"v3.13": (3, 13), "v3.17": (3, 17), "v3.20": (3, 20), "v3.24": (3, 24), "v3.25": (3, 25), "v3.29": (3, 29),
        "v3.30": (3, 30), "v3.32": (3, 32)}  # fmt: skip
FIELD = re.compile(r"\{(\w+):(\w+)\}")
COMMS = ("curl", "<idle>", "<...>", "ksoftirqd/0", "tokio runtime w", "my-app-1", "a: b", "kworker/u8:6")
# (after the process id, flags, function): 4.18, 5.4, 5.10, 5.15, 6.18, PREEMPT_RT, record-tgid.
KERNELS = (
    ("", "..s.", "0x00000001"), ("", "..s.", "0"), ("", "d.s.", "bpf_trace_printk"), ("", "..s2.", "bpf_trace_printk"),
    ("", "bNs2.", "bpf_trace_printk"), ("", "d..h3..", "bpf_trace_printk"), ("(    120) ", "..s2.", "bpf_trace_printk"),
)  # fmt: skip
INTERFACES = ("eth0", "ens192", "calif00dbeef012", "bond0.100", "lo")


def release(text: str) -> tuple[int, int]:
    """(3, 24) of ``v3.24``."""
    major, minor = text.removeprefix("v").split(".")
    return int(major), int(minor)


def lives(message: Message, era: tuple[int, int]) -> bool:
    """Whether a release prints it."""
    return release(message.since) <= era and (not message.until or era <= release(message.until))


def corpus(name: str) -> str:
    """The text of one era's file; the same every time."""
    era, chance = ERAS[name], random.Random(name)
    lines = []
    for message in (each for each in MESSAGES if lives(each, era)):
        ipv6 = era >= (3, 27) and message.tagged and chance.random() < 0.2
        text = render(message, {n: value(chance, kind, ipv6) for n, kind in FIELD.findall(message.template)}, era)
        if message.tagged:
            text = f"{'IPv6 ' if ipv6 else ''}{tag(chance, message, era)}: {text}"
        lines.append(f"{message.template}\t{header(chance)}{text}")
    return "\n".join(lines) + "\n"


def value(chance: random.Random, kind: str, ipv6: bool) -> str | int:
    """Something that such a placeholder can hold."""
    if kind == "ip":
        if ipv6:
            return f"fd00::{chance.randrange(1, 9999):x}"
        return f"10.{chance.randrange(256)}.0.{chance.randrange(256)}"
    if kind in ("d", "x"):
        return chance.choice((0, 1, 7, 80, 30080, 65535, 2**31))
    return chance.choice(("main", "ens192", "x")) if kind == "w" else chance.choice(("", " (1)", " 17 of 20"))


def tag(chance: random.Random, message: Message, era: tuple[int, int]) -> str:
    """The prefix that the program puts in front."""
    if message.stage == "connect-time":
        return "CALI-C" if era < (3, 25) else chance.choice(("CTLB------------", "CTLB-V6---------"))
    if message.stage == "cleaner":
        return "CT-CLEANER------"
    width = 8 if era < (3, 25) else 15
    return f"{chance.choice(INTERFACES)[:width]:-<{width}}-{chance.choice('IE')}"


def header(chance: random.Random) -> str:
    """What a kernel prints in front, and now and then what a collector of logs puts before that."""
    tgid, flags, function = chance.choice(KERNELS)
    before = chance.choice(("", "", "", "2026-01-02T03:04:05.678901234Z stdout F "))
    stamp = f"{chance.randrange(10**6)}.{chance.randrange(10**6):06d}"
    return (
        f"{before}{chance.choice(COMMS):>16}-{chance.randrange(4194304):<7} {tgid}[{chance.randrange(256):03d}] "
        f"{flags} {stamp:>13}: {function}: "
    )


def main() -> int:
    """The exit status."""
    DATA.mkdir(exist_ok=True)
    for name in ERAS:
        path = DATA / f"{name}.tsv"
        if "--check" not in sys.argv:
            path.write_text(corpus(name))
        elif not path.exists() or path.read_text() != corpus(name):
            sys.stderr.write(f"error: {path} is not what the table says\nhint: run tools/gen_log_corpus.py\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
