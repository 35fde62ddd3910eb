"""What Felix's own log says: a check for each line that we know, and one for the line that must be there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

from calitrace.calico import felix_log as log
from calitrace.checks.finding import Check, Finding, Said, Section, Severity, Unknown
from calitrace.checks.objects import ebpf_on, patch
from calitrace.checks.snapshot import Link

Links = tuple[Link, ...]
# Felix tries again at each update, and each 90 s to refresh its routes and sets: what it has long not said is over.
_RETRIED = "services.log-attach"
_STILL = 5  # times that an interface fails and is no passing trouble; projectcalico/calico#10376
_OLD_PROGRAMS = (
    "the interface has its programs, and Felix fails again and again to change them: they may be those of an earlier "
    "policy or setting (projectcalico/calico#10376)"
)


def felix_started(felix_log: tuple[log.Line, ...], links: Links) -> Said:
    """Looks for the line with which Felix starts the eBPF dataplane.

    Only when the log goes back to Felix's start can its absence mean something.
    """
    begins = any(line.text.startswith(log.BEGINS) for line in felix_log)
    if any(log.STARTED in line.text for line in felix_log):
        return
    if not begins:
        yield Unknown(f"the log does not go back to Felix's start: it begins at {felix_log[0].time}")
        return
    if not ebpf_on(links):
        yield Finding(
            Severity.ERROR,
            "",
            (f"not in the log: {log.STARTED}", f"first line: {felix_log[0].raw}"),
            "Felix started without its eBPF dataplane",
            patch('"bpfEnabled":true'),
        )


def _from_log(known: log.Known, felix_log: tuple[log.Line, ...], links: Links | None = None) -> Iterator[Finding]:
    found = log.present(known, felix_log)
    grave, meaning = known.grave, known.meaning
    if known.check == _RETRIED:
        found = log.recent(found, felix_log[-1])
    if known.check == _RETRIED and links is not None:
        lasting = [line for line in found if not _recovered(line, links)]
        if not lasting:
            # Its programs are there, and still Felix tries: what it tries to change does not come about.
            here = {link.name for link in links}
            late = [line for line in found if log.interface(line) in here]
            again = Counter(map(log.interface, late))
            found = [line for line in late if again[log.interface(line)] >= _STILL]
            grave, meaning = False, _OLD_PROGRAMS
        else:
            found = lasting
    if found:
        times = f"{len(found)} times, last:" if len(found) > 1 else "once:"
        severity = Severity.ERROR if grave else Severity.WARNING
        fix = known.fix.replace("IFACE", log.interface(found[-1]) or "IFACE")
        yield Finding(severity, "", (times, found[-1].raw), meaning, fix)


def _recovered(line: log.Line, links: Links) -> bool:
    """Whether the interface that a line names has its programs by now, or is gone; Felix says that it will retry."""
    name = log.interface(line)
    here = [link for link in links if link.name == name]
    return name != "" and all(link.all_calico for link in here)


def log_checks(area: str) -> tuple[Check, ...]:
    """A check for each line of Felix's log that belongs to *area*."""
    sections = {"services": Section.SERVICES, "maps": Section.TOOL, "debug": Section.LOGS}
    return tuple(
        Check(row.check, sections[area], _log_function(row)) for row in log.KNOWN if row.check.startswith(f"{area}.")
    )


def _log_function(row: log.Known) -> partial[Iterator[Finding]]:
    function = partial(_from_log, row)
    last = " of its last ten minutes" if row.check == _RETRIED else ""
    function.__doc__ = f"Looks in Felix's log{last} for: {row.text}\n\nIt means: {row.meaning}."
    return function
