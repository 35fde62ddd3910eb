"""Felix's own log: the format of its lines, and those that say something about the eBPF dataplane.

Format: ``YYYY-MM-DD HH:MM:SS.mmm [LEVEL][pid] felix/file.go LINE: text key=value``; a runtime may have put its time
and stream name before it, or the whole into a member of JSON. Source: the files named in the table,
felix/dataplane/linux and felix/bpf of v3.13 to master.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

_LINE = re.compile(
    r"(?:^|\s)(?P<time>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,]\d{3,9}(?:Z|[+-]\d\d:?\d\d)?) "
    r"\[(?P<level>[A-Z]+)\]\[(?P<pid>\d+)\] "
    r"(?P<component>[^/\s]+)/(?P<file>\S+) (?P<line>\d+): (?P<text>.*)$"
)
_MEMBERS = ("log", "message", "msg", "MESSAGE", "line")  # Docker, fluentd, Loki, the journal
_INTERFACE = re.compile(r'\b(?:iface|name|ifaceName)="?([^"\s]+)')
STARTED = "BPF enabled, starting BPF endpoint manager and map manager."
UNSUPPORTED = "mode enabled but not supported by the kernel"


@dataclass(frozen=True)
class Line:
    """One line. *raw*: as it was read. *level*: INFO, WARNING, ERROR, FATAL, PANIC, DEBUG."""

    raw: str
    time: str
    level: str
    file: str
    text: str


@dataclass(frozen=True)
class Known:
    """A line that means trouble. *check*: the id of the check that looks for it. *text*: a pattern within the line.

    *cured*: a pattern that, on a later line, shows that it is over; "" when only a restart can. *grave*: traffic is
    lost, not only at risk.
    """

    check: str
    text: str
    meaning: str
    fix: str
    grave: bool = True
    cured: str = ""


KNOWN = (
    Known(
        "services.log-unsupported",
        UNSUPPORTED,
        "Felix found the kernel unsupported and fell back to the standard dataplane; where kube-proxy has gone, no "
        "service works on this node",
        "read error= in that line; update the kernel (5.3 or later, RHEL 4.18.0-193 or later, v3.31 and later: 5.10), "
        "or run kube-proxy again; kubectl patch ds -n kube-system kube-proxy --type merge -p "
        """'{"spec":{"template":{"spec":{"nodeSelector":{"non-calico": null}}}}}'""",
        cured=re.escape(STARTED),
    ),
    Known(
        "services.log-no-api-client",
        "BPF enabled but no Kubernetes client available, unable to run kube-proxy module",
        "Felix cannot read Services: the NAT maps stay empty and no service works on this node",
        "kubectl get configmap -A --field-selector metadata.name=kubernetes-services-endpoint -o yaml",
    ),
    Known(
        "services.log-ctlb",
        "failed to attach connect-time load balancer, bailing out|unable to do connect-time load balancing"
        "|Failed to mount cgroup2 filesystem",
        "Felix stops: cgroup v2 is not mounted, another program holds the hook, or the kernel's verifier refused it",
        "mount | grep cgroup2; then look at the libbpf lines above it in the log",
    ),
    Known(
        "services.log-mark-mask",
        r"MarkMask doesn't cover bits that are used \(unconditionally\) by eBPF mode",
        "Felix stops: the mark mask must cover 0x1ff00000",
        'calicoctl patch felixconfiguration default --patch \'{"spec":{"iptablesMarkMask":4294901760}}\'',
    ),
    Known(
        "services.log-bpffs",
        "Failed to mount bpffs|Failed to mount BPF filesystem",
        "maps cannot be pinned; every restart of calico-node would lose them",
        "mount -t bpf bpffs /sys/fs/bpf; or repair the init container mount-bpffs",
    ),
    Known(
        "services.log-maps",
        "error creating bpf maps|Cannot load interface state map|Failed to create BPF endpoint manager",
        "Felix stops: it lacks a privilege, locked memory, or the kernel is in lockdown",
        "kubectl describe pod -n calico-system -l k8s-app=calico-node  # is it privileged?",
    ),
    Known(
        "services.log-attach",
        "Failed to apply policy to (?:interface|endpoint)|Failed to attach to TC section",
        "the programs of that interface are not in place, or are old: its traffic is not handled as policy says",
        "look at the line's error= and the libbpf lines above it; bpftool net show dev IFACE",
    ),
    Known(
        "services.log-master-ignored",
        r"Master interface '[^']+' ignored\. Add it to the bpfDataIfacePattern config",
        "what the device on top (a bond, bridge or VLAN) carries is seen at its port, if anywhere, where reverse path "
        "checks fail (projectcalico/calico#8917)",
        "add the interface to bpfDataIfacePattern in FelixConfiguration, unless it carries nothing of the cluster's",
    ),
    Known(
        "services.log-nat-devices",
        "Failed to configure BPF devices",
        "Felix stops: it could not make bpfin.cali and bpfout.cali",
        "ip -d link show bpfin.cali; ip -d link show bpfout.cali",
    ),
    Known(
        "services.log-proxy",
        "Failed invoking dataplane syncer|Failed to start kube-proxy|inconsistent backed map, missing ep"
        "|failed to apply (?:LoadBalancer IP|ExternalIP|NodePort)"
        "|Failed to load previous state of NAT maps|kube-proxy failed to resync after host IPs update",
        "the NAT maps are not what the cluster's Services say",
        "calitrace check services --kubeconfig FILE  # compares them; restart calico-node, which writes them anew",
        cured="new state written",
    ),
    Known(
        "services.log-healthz-port",
        r"BPF Proxy Healthz server failed.*address already in use",
        "kube-proxy owns the health port: it still runs beside the eBPF dataplane (projectcalico/calico#10748)",
        "remove kube-proxy; where it has to stay; calicoctl patch felixconfiguration default --patch "
        '\'{"spec":{"bpfKubeProxyHealthzPort":0}}\'',
        grave=False,
    ),
    Known(
        "services.log-rp-filter",
        "Failed to set rp_filter for",
        "the kernel's reverse path filter may drop what Calico's programs let pass",
        "sysctl -a -r 'conf.*rp_filter'; find who sets it: systemd-networkd, tuned, /etc/sysctl.d",
        grave=False,
    ),
    Known(
        "maps.log-load",
        "Failed to load program|Failed to load BPF policy program",
        "the kernel refused a program; the interface keeps its old one, or has none "
        "(a map of another size: projectcalico/calico#9651)",
        "look at the libbpf lines above it; after a change of a map's size restart calico-node",
    ),
    Known(
        "maps.log-conntrack-full",
        "eBPF conntrack table is becoming full|Failed to start resizing conntrack map",
        "new connections fail, or old ones are forgotten, when the conntrack map is full",
        "raise bpfMapSizeConntrack in FelixConfiguration",
    ),
    Known(
        "maps.log-replaced",
        "Map with same name but different parameters exists. Deleting it|error copying data from old map"
        r"|Old map exists \(from previous migration attempt",
        "a map was made anew: connections known to the old one are lost",
        "nothing, if it was an upgrade; clients connect anew",
        grave=False,
    ),
    Known(
        "maps.log-update",
        "Failed to load updates|Failed to update BPF map|Failed to delete from BPF map",
        "Felix could not write its routes; a full map loses routes to pods or nodes",
        "raise bpfMapSizeRoute in FelixConfiguration",
    ),
    Known(
        "maps.log-memlock",
        "Failed to increase RLIMIT_MEMLOCK",
        "before Linux 5.11 maps and programs count against locked memory: loading them may fail",
        "give calico-node CAP_SYS_RESOURCE",
        grave=False,
    ),
    Known(
        "maps.log-conntrack-scan",
        "Failed to iterate over conntrack map|Failed to run bpf conntrack cleaner"
        "|Failed to write updates to conntrack cleanup BPF map",
        "conntrack entries are not expired: the map fills up",
        "calitrace check maps  # how full is it?; restart calico-node",
        grave=False,
    ),
    Known(
        "debug.log-lockdown",
        "Kernel lockdown=confidentiality detected",
        "bpfLogLevel: Debug is forced off: there is no packet log on this node (projectcalico/calico#13142)",
        "boot with lockdown=integrity where a packet log is needed; calitrace's own tracepoints are refused as well",
        grave=False,
    ),
)


_TAIL = 100  # lines in which Felix's last one is looked for
_RECENT = timedelta(minutes=10)
BEGINS = ("Felix starting up", "Logging initialized")
_TELLING = re.compile(
    "|".join((*BEGINS, re.escape(STARTED), *(p for row in KNOWN for p in (row.text, row.cured) if p)))
)


def parse(lines: Iterable[str]) -> Iterator[Line]:
    """The lines that have Felix's format, in order; others (libbpf, BIRD, the container's start) are left out."""
    for raw in lines:
        line = _unwrapped(raw) if raw.startswith("{") else raw
        match = _LINE.search(line)
        if match:
            yield Line(line.strip(), match["time"], match["level"], match["file"], match["text"])


def _unwrapped(raw: str) -> str:
    """The line in JSON that a container runtime or a log collector wrote around it."""
    try:
        wrapped = json.loads(raw)
    except ValueError:
        return raw
    said = (wrapped.get(each) for each in _MEMBERS)
    return next((each.rstrip() for each in said if isinstance(each, str)), raw)


def telling(lines: Iterable[str]) -> tuple[Line, ...]:
    """Of Felix's lines those that any check looks at, and the first and the last, which say from when to when it is."""
    found: list[Line] = []
    tail: deque[str] = deque(maxlen=_TAIL)
    for raw in lines:
        if not found or _TELLING.search(raw):
            found += parse([raw])
            tail.clear()
        else:
            tail.append(raw)
    return (*found, *tuple(parse(tail))[-1:])


def recent(lines: Sequence[Line], until: Line) -> list[Line]:
    """Those of the last ten minutes before *until*, by the log's own times; what tells no time is left out."""
    end = _time(until)
    times = ((line, _time(line)) for line in lines)
    return [line for line, time in times if end is not None and time is not None and end - time <= _RECENT]


def _time(line: Line) -> datetime | None:
    # All of one log are in the same zone.
    try:
        return datetime.fromisoformat(line.time[:19])
    except ValueError:  # a day or hour that there is not
        return None


def interface(line: Line) -> str:
    """The interface that a line names in its fields: ``iface="eth0"``; "" where it names none."""
    match = _INTERFACE.search(line.text)
    return match[1] if match else ""


def present(known: Known, lines: Iterable[Line]) -> list[Line]:
    """The lines that a row of the table speaks of, unless what cures them came later."""
    text, cured = re.compile(known.text), re.compile(known.cured) if known.cured else None
    found: list[Line] = []
    for line in lines:
        if text.search(line.text):
            found.append(line)
        elif cured is not None and cured.search(line.text):
            found = []
    return found
