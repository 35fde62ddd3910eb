"""Section "eBPF program debug logs": what is logged, by mistake or not at all, and who takes the lines."""

from __future__ import annotations

from calitrace.calico.felix_config import Setting, Settings, Unset
from calitrace.calico.release import Release
from calitrace.checks.felix_log import log_checks
from calitrace.checks.finding import Check, Finding, Said, Section, Severity, Unknown
from calitrace.checks.objects import RESTART, iter_numbered, kernel_version, patch
from calitrace.checks.snapshot import Host, Link, Process, ProgramTimes

_ENOUGH_RUNS, _PRINTING_NS = 100, 10_000  # cold caches make few runs slow as well
_GROUPS = frozenset({"weps", "heps", "all"})


def level(felix: Settings) -> Said:
    """Looks at bpfLogLevel: Debug prints dozens of lines for each packet (12 to 28 µs), filtered ones excepted."""
    setting, filters = felix.get("bpfLogLevel"), felix.get("bpfLogFilters")
    if isinstance(setting, Unset):
        yield Unknown(setting.why)
    elif setting.says("Debug"):
        limited = not isinstance(filters, Unset) and bool(filters.value)
        yield Finding(
            Severity.INFO if limited else Severity.WARNING,
            "",
            (str(setting), str(filters) if not isinstance(filters, Unset) else filters.why),
            "Calico's programs log " + ("the packets of the filters" if limited else "every packet") + ": slow, and "
            "often forgotten",
            patch('"bpfLogLevel":"Off"', setting),
        )


def conntrack_level(felix: Settings) -> Said:
    """Looks at bpfConntrackLogLevel (v3.30): Debug logs each entry that the cleaner of the conntrack map looks at."""
    setting = felix.get("bpfConntrackLogLevel")
    if isinstance(setting, Unset):
        yield Unknown(setting.why)
    elif setting.says("Debug"):
        yield Finding(
            Severity.WARNING,
            "",
            (str(setting),),
            "each entry of the conntrack map is logged every 10 seconds: slow, and often forgotten",
            patch('"bpfConntrackLogLevel":"Off"', setting),
        )


def info_is_silent(felix: Settings, release: Release) -> Said:
    """Looks for bpfLogLevel Info on v3.30 and later, where it prints nothing: only Debug does."""
    setting = felix.get("bpfLogLevel")
    if isinstance(setting, Unset):
        yield Unknown(setting.why)
    elif setting.says("Info") and release.oldest >= (3, 30):
        yield Finding(
            Severity.INFO,
            "",
            (str(setting), str(release)),
            "from v3.30 on there are no programs for Info: nothing is logged",
            patch('"bpfLogLevel":"Debug"', setting)
            + "; for as long as you read it, then; "
            + patch('"bpfLogLevel":"Off"', setting),
        )


def filters(felix: Settings, links: tuple[Link, ...]) -> Said:
    """Compares bpfLogFilters with bpfLogLevel and with the interfaces of this node.

    Filters count only with Debug. With filters, an interface that none of them names logs nothing.
    """
    setting, wanted = felix.get("bpfLogFilters"), felix.get("bpfLogLevel")
    if isinstance(setting, Unset) or isinstance(wanted, Unset):
        yield Unknown("bpfLogFilters or bpfLogLevel is not known")
        return
    named = set(setting.value) if isinstance(setting.value, dict) else set()
    if named and not wanted.says("Debug"):
        yield Finding(
            Severity.INFO,
            "",
            (str(setting), str(wanted)),
            "filters without bpfLogLevel Debug log nothing",
            patch('"bpfLogFilters":null', setting),
        )
    strange = sorted(named - _GROUPS - {link.name for link in links})
    if strange and not named & _GROUPS:
        yield Finding(
            Severity.INFO,
            "",
            (str(setting), *(f"no interface {name} on this node" for name in strange)),
            "the filters name no interface of this node, or none any more",
            patch('"bpfLogFilters":{"all":"host ADDRESS"}', setting),
        )


def refused_by_verifier(felix: Settings, host: Host, release: Release) -> Said:
    """Looks for bpfLogLevel Debug with v3.30 on Linux 5.15, whose verifier refuses v3.30's debug programs.

    Then switching the log on takes the network down.
    """
    setting, version = felix.get("bpfLogLevel"), kernel_version(host.kernel)
    if isinstance(setting, Unset) or version is None:
        yield Unknown("bpfLogLevel or the kernel's version is not known")
    elif setting.says("Debug") and version[:2] == (5, 15) and release.oldest == (3, 30):
        yield Finding(
            Severity.ERROR,
            "",
            (str(setting), f"kernel {host.kernel}", str(release)),
            "this kernel refuses v3.30's debug programs: interfaces lose theirs (projectcalico/calico#10911)",
            patch('"bpfLogLevel":"Off"', setting),
        )


def lockdown_mode(lockdown: str) -> Said:
    """Looks at the kernel's lockdown mode: in "confidentiality" there is no packet log."""
    if lockdown == "confidentiality":
        yield Finding(
            Severity.WARNING,
            "",
            (f"/sys/kernel/security/lockdown: {lockdown}",),
            "the kernel refuses trace printing: Debug logs nothing, or floods the kernel's log before the fix "
            "(projectcalico/calico#13142)",
            "boot with lockdown=integrity where the packet log is needed",
        )


def trace_pipe_readers(trace_readers: tuple[Process, ...]) -> Said:
    """Looks for processes that have trace_pipe open: each line goes to one reader only."""
    if trace_readers:
        yield Finding(
            Severity.INFO,
            "",
            tuple(f"process {each.pid} ({each.name}) has trace_pipe open" for each in trace_readers),
            "whoever else reads the log gets only the lines that these leave",
            "kill "
            + " ".join(str(each.pid) for each in trace_readers)
            + "; calitrace log  # reads beside it and takes nothing",
        )


def felix_level(felix: Settings) -> Said:
    """Looks at logSeverityScreen: Felix's own log at Debug costs CPU and disk."""
    setting = felix.get("logSeverityScreen")
    if isinstance(setting, Unset):
        yield Unknown(setting.why)
    elif setting.says("Debug") or setting.says("Trace"):
        yield Finding(
            Severity.INFO,
            "",
            (str(setting),),
            "Felix logs all it does: slow on a large cluster, and often forgotten",
            patch('"logSeverityScreen":"Info"', setting),
        )


def slow_programs(program_times: ProgramTimes, links: tuple[Link, ...], felix: Settings | None = None) -> Said:
    """Measures whether Calico's programs on interfaces take as long as while they print: 10 µs and more a packet.

    Without the log it is 1 to 3 µs, more with a policy of very many rules. Where bpfLogLevel is known to be Debug,
    debug.level speaks.
    """
    wanted = felix.get("bpfLogLevel") if felix else None
    if isinstance(wanted, Setting) and wanted.says("Debug"):
        return
    hooked = (program for link in links for programs in link.programs.values() for program in programs)
    attached = {program.id for program in hooked if program.is_calico}
    slow = [
        each
        for each in program_times.programs
        if each.id in attached and each.run_count >= _ENOUGH_RUNS and each.run_ns >= _PRINTING_NS * each.run_count
    ]
    if slow:
        said = str(wanted) if isinstance(wanted, Setting) else "bpfLogLevel is not known"
        lines = (f"{e.name} (id {e.id}): {e.run_count} runs, {e.run_ns / e.run_count / 1000:.1f} µs each" for e in slow)
        yield Finding(
            Severity.WARNING,
            "",
            (*iter_numbered(lines, 4), said),
            "as slow as with the packet log on: programs of bpfLogLevel Debug may still be attached, unless the "
            "policy is very long or this machine very slow",
            f"calitrace log --duration 5  # do they print?; where they do; {RESTART}",
        )


CHECKS = (
    Check("debug.level", Section.LOGS, level),
    Check("debug.conntrack-level", Section.LOGS, conntrack_level),
    Check("debug.info-is-silent", Section.LOGS, info_is_silent),
    Check("debug.filters", Section.LOGS, filters),
    Check("debug.refused-by-verifier", Section.LOGS, refused_by_verifier),
    Check("debug.lockdown", Section.LOGS, lockdown_mode),
    Check("debug.trace-pipe-readers", Section.LOGS, trace_pipe_readers),
    Check("debug.slow-programs", Section.LOGS, slow_programs),
    Check("debug.felix-level", Section.LOGS, felix_level),
    *log_checks("debug"),
)
