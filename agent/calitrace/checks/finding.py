"""What a check is, and what it may say: nothing, findings, or that it cannot tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    """*ERROR*: traffic is lost or will be. *WARNING*: it can be, or is slow. *INFO*: worth knowing in an incident."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Section:
    """Titles of Calico's page "Troubleshoot eBPF mode"."""

    SERVICES = "Troubleshoot access to services"
    DROPS = "Check if a program is dropping packets"
    CPU = "Debug high CPU usage"
    LOGS = "eBPF program debug logs"
    TOOL = "The calico-node -bpf tool"
    PERFORMANCE = "Poor performance"


@dataclass(frozen=True)
class Finding:
    """*subject*: the interface, map or service it is about, or "". *evidence*: the very lines, bytes, counters.

    *meaning*: what that does to traffic. *fix*: a command to run, or what to change; alternatives and steps are
    separated by "; ".
    """

    severity: Severity
    subject: str
    evidence: tuple[str, ...]
    meaning: str
    fix: str


@dataclass(frozen=True)
class Unknown:
    """A check looked and cannot tell. *why*: what it would have to know."""

    why: str


Said = Iterable[Finding | Unknown]


@dataclass(frozen=True)
class Check:
    """A check. *id*: stable, ``area.name``. *function*: its parameters are the sources that it needs, by name; those
    with a default are optional and come as None when they are missing. Its docstring is what ``--explain`` prints.
    """

    id: str
    section: str
    function: Callable[..., Said]

    @property
    def area(self) -> str:
        """The part before the point."""
        return self.id.partition(".")[0]

    @property
    def needs(self) -> tuple[str, ...]:
        """The sources without which it cannot run."""
        found = inspect.signature(self.function).parameters.values()
        return tuple(each.name for each in found if each.default is inspect.Parameter.empty)

    @property
    def uses(self) -> tuple[str, ...]:
        """The sources that it takes into account when they are there."""
        needs = self.needs
        return tuple(n for n in inspect.signature(self.function).parameters if n not in needs)

    @property
    def explanation(self) -> str:
        """What it looks at, and why."""
        return inspect.getdoc(self.function) or ""


class Status(Enum):
    """*NOT_RUN*: a source is missing, or what it holds does not decide; never the same as passed."""

    PASSED = "passed"
    FINDINGS = "findings"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Result:
    """What one check said. *why*: of NOT_RUN; also beside findings when it could not look at everything."""

    check: Check
    status: Status
    findings: tuple[Finding, ...] = ()
    why: tuple[str, ...] = ()
