"""Section "Debug high CPU usage": who uses the CPU, and what makes calico-node work more than it must."""

from __future__ import annotations

from typing import Any

from calitrace.calico.felix_config import Settings, Unset
from calitrace.calico.release import Release
from calitrace.checks.finding import Check, Finding, Said, Section, Severity, Unknown
from calitrace.checks.objects import (
    KUBE_PROXY_OFF,
    ebpf_on,
    grep_log,
    iter_numbered,
    kube_proxies,
    patch,
    proxy_chains,
    proxy_rules,
)
from calitrace.checks.snapshot import Link, Map, Process, ProgramTimes, ThreadTimes

Links = tuple[Link, ...]
BUSY = 0.8  # of one CPU: what calico-node uses at rest is a few hundredths
MANY_ENDPOINTS = 1000
LARGE_CONNTRACK = 1_000_000  # projectcalico/calico#10642: 4 million entries take nearly the 10 s between two sweeps
LONG_SWEEP_S = 5.0
PROGRAM_SHARE = 0.2


def _felix_share(thread_times: ThreadTimes) -> float:
    used = sum(each.cpu_s for each in thread_times.threads if each.process == "calico-node")
    return used / thread_times.seconds if thread_times.seconds > 0 else 0.0


def calico_node(thread_times: ThreadTimes) -> Said:
    """Measures the CPU time of calico-node's threads over the interval; more than 0.8 of a CPU is a finding."""
    if not any(each.process == "calico-node" for each in thread_times.threads):
        yield Unknown("no process calico-node in sight")
        return
    share = _felix_share(thread_times)
    if share > BUSY:
        own = [each for each in thread_times.threads if each.process == "calico-node"]
        busiest = sorted(own, key=lambda each: -each.cpu_s)
        yield Finding(
            Severity.WARNING,
            "calico-node",
            (
                f"{share:.2f} CPUs over {thread_times.seconds:g} s",
                *(f"thread {t.thread} (process {t.pid}): {t.cpu_s:.2f} s" for t in busiest[:3] if t.cpu_s > 0),
            ),
            "calico-node is busy all the time: the other findings of this area, if any, say why",
            "calitrace check cpu --interval 10; " + grep_log("Summarising"),
        )


def kube_proxy_fight(links: Links, processes: tuple[Process, ...], felix: Settings) -> Said:
    """Looks for kube-proxy while bpfKubeProxyIptablesCleanupEnabled is true.

    Felix removes kube-proxy's iptables rules, kube-proxy writes them again, without end. Besides the CPU, services
    flap.
    """
    found = kube_proxies(processes)
    cleanup = felix.get("bpfKubeProxyIptablesCleanupEnabled")
    if isinstance(cleanup, Unset):
        yield Unknown(cleanup.why)
    elif isinstance(found, Unknown):
        yield found
    elif found and cleanup.value and ebpf_on(links):
        yield Finding(
            Severity.ERROR,
            "kube-proxy",
            (*(f"process {each.pid}: {each.command or each.name}" for each in found), str(cleanup)),
            "Felix and kube-proxy fight over the iptables rules: both burn CPU and services flap "
            "(projectcalico/calico#10538)",
            f"{KUBE_PROXY_OFF}; where it has to stay; " + patch('"bpfKubeProxyIptablesCleanupEnabled":false', cleanup),
        )


def kube_proxy_rules(links: Links, chains: tuple[str, ...], processes: tuple[Process, ...]) -> Said:
    """Looks for what kube-proxy leaves behind while eBPF mode is on and kube-proxy is gone: its chains (KUBE-SERVICES,
    KUBE-SVC-*), its nftables table, and kube-ipvs0 of its IPVS mode, which holds the services' addresses.

    They cost each packet that enters the host's stack, and send traffic to endpoints that have long gone.
    """
    left = proxy_rules(links, chains)
    found = kube_proxies(processes)
    if isinstance(found, Unknown):
        yield found
    elif left and ebpf_on(links) and not found:
        yield Finding(
            Severity.WARNING,
            "",
            tuple(left),
            "left of a kube-proxy that no longer runs (projectcalico/calico#4146 looked like that)",
            "kube-proxy --cleanup  # on this node; or restart the node",
        )


def kube_proxy_rules_return(links: Links, chains: tuple[str, ...], chains_later: tuple[str, ...]) -> Said:
    """Looks twice, an interval apart, for chains of kube-proxy that were not there the first time.

    In eBPF mode Felix removes them; chains that come back are somebody's who writes them again: a kube-proxy, also one
    inside another process such as k3s's. kube-proxy looks after its rules each 30 s, so --interval 60 sees most.
    """
    known = set(chains)
    new = [chain for chain in proxy_chains(chains_later) if chain not in known]
    if new and ebpf_on(links):
        yield Finding(
            Severity.WARNING,
            "",
            (f"{len(new)} chains that were not there before", *iter_numbered(new, 3)),
            "something writes kube-proxy's rules while Felix removes them: both burn CPU and services flap "
            "(projectcalico/calico#10538)",
            f"{KUBE_PROXY_OFF}; where it has to stay; " + patch('"bpfKubeProxyIptablesCleanupEnabled":false'),
        )


def min_sync_period(thread_times: ThreadTimes, felix: Settings, maps: tuple[Map, ...]) -> Said:
    """Compares bpfKubeProxyMinSyncPeriod with the number of backends, where calico-node is busy.

    Each change of an endpoint may rewrite the NAT maps once in that time.
    """
    if not any(each.process == "calico-node" for each in thread_times.threads):
        yield Unknown("no process calico-node in sight")
        return
    period = felix.get("bpfKubeProxyMinSyncPeriod")
    backends = [each for each in maps if each.name.endswith("_nat_be") and each.entries is not None]
    if isinstance(period, Unset) or not backends:
        yield Unknown("bpfKubeProxyMinSyncPeriod or the number of backends is not known")
        return
    count = sum(each.entries or 0 for each in backends)
    if _felix_share(thread_times) > BUSY / 2 and count > MANY_ENDPOINTS and str(period.value) in ("1s", "0s", "1", "0"):
        yield Finding(
            Severity.INFO,
            "calico-node",
            (str(period), f"{count} backends", f"calico-node: {_felix_share(thread_times):.2f} CPUs"),
            "with that many endpoints a sync each second can keep calico-node busy",
            patch('"bpfKubeProxyMinSyncPeriod":"10s"', period),
        )


def slices_unused(felix: Settings, release: Release, endpoint_slices: tuple[dict[str, Any], ...]) -> Said:
    """Looks for bpfKubeProxyEndpointSlicesEnabled false where the cluster has EndpointSlices (v3.16 to v3.31).

    Then Felix watches Endpoints: each change of one pod sends the whole list.
    """
    setting = felix.get("bpfKubeProxyEndpointSlicesEnabled")
    if isinstance(setting, Unset):
        yield Unknown(setting.why)
    elif setting.value is False and endpoint_slices and release.newest <= (3, 31):
        yield Finding(
            Severity.WARNING,
            "",
            (str(setting), f"{len(endpoint_slices)} EndpointSlices in the cluster", str(release)),
            "Felix watches Endpoints instead of EndpointSlices: more CPU for each change of a pod",
            patch('"bpfKubeProxyEndpointSlicesEnabled":true', setting),
        )


def conntrack_size(maps: tuple[Map, ...]) -> Said:
    """Counts the entries of the conntrack map, which calico-node walks every 10 seconds.

    At four million a walk takes nearly that long.
    """
    found = [each for each in maps if "_ct" in each.name and each.name.startswith(("cali_v4_ct", "cali_v6_ct"))]
    counted = [each for each in found if each.entries is not None and "_nats" not in each.name]
    if not counted:
        yield Unknown("no conntrack map was counted")
    for each in counted:
        if (each.entries or 0) > LARGE_CONNTRACK:
            yield Finding(
                Severity.WARNING,
                each.name,
                (f"{each.name}: {each.entries} of {each.max_entries} entries",),
                "calico-node walks all of them every 10 seconds (projectcalico/calico#10642)",
                "shorten bpfConntrackTimeouts (v3.30), or let the kernel walk it (v3.30); "
                + patch('"bpfConntrackMode":"BPFProgram"'),
            )


def conntrack_sweep(metrics: dict[str, float]) -> Said:
    """Reads from Felix's metrics (prometheusMetricsEnabled) how long its last walk of the conntrack map took.

    It begins one every 10 seconds: a walk of more than half of that is a finding.
    """
    took_ns = metrics.get("felix_bpf_conntrack_sweep_duration")
    if took_ns is None:
        yield Unknown("Felix's metrics do not have felix_bpf_conntrack_sweep_duration")
    elif took_ns / 1e9 > LONG_SWEEP_S:
        used = metrics.get("felix_bpf_conntrack_used")
        yield Finding(
            Severity.WARNING,
            "",
            (
                f"felix_bpf_conntrack_sweep_duration {took_ns:.0f} ({took_ns / 1e9:.1f} s)",
                f"felix_bpf_conntrack_used {used:.0f}" if used is not None else "felix_bpf_conntrack_used: not there",
            ),
            "calico-node walks its conntrack map most of the time, and expired entries stay too long "
            "(projectcalico/calico#10642)",
            "shorten bpfConntrackTimeouts (v3.30), or let the kernel walk it (v3.30); "
            + patch('"bpfConntrackMode":"BPFProgram"'),
        )


def bpf_programs(program_times: ProgramTimes) -> Said:
    """Measures the run time of each BPF program over the interval, with kernel statistics switched on meanwhile.

    A fifth of a CPU for one program is a finding: a flood, or its debug log is on.
    """
    for each in program_times.programs:
        share = each.run_ns / 1e9 / program_times.seconds if program_times.seconds > 0 else 0.0
        if share > PROGRAM_SHARE:
            yield Finding(
                Severity.WARNING,
                f"{each.name} (id {each.id})",
                (
                    f"{share:.2f} CPUs over {program_times.seconds:g} s",
                    f"{each.run_count} runs, {each.run_ns // max(each.run_count, 1)} ns each",
                ),
                "this program takes a large part of a CPU",
                "calitrace check debug  # is Calico's packet log on?; calitrace check drops  # is it a flood?",
            )


CHECKS = (
    Check("cpu.calico-node", Section.CPU, calico_node),
    Check("cpu.kube-proxy-fight", Section.CPU, kube_proxy_fight),
    Check("cpu.kube-proxy-rules", Section.CPU, kube_proxy_rules),
    Check("cpu.kube-proxy-rules-return", Section.CPU, kube_proxy_rules_return),
    Check("cpu.min-sync-period", Section.CPU, min_sync_period),
    Check("cpu.endpoint-slices", Section.CPU, slices_unused),
    Check("cpu.conntrack-size", Section.CPU, conntrack_size),
    Check("cpu.conntrack-sweep", Section.CPU, conntrack_sweep),
    Check("cpu.bpf-programs", Section.CPU, bpf_programs),
)
