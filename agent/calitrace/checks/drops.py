"""Section "Check if a program is dropping packets": Calico's own counters and the clsact qdisc's, over an interval."""

from __future__ import annotations

from calitrace.calico import reasons
from calitrace.checks.finding import Check, Finding, Said, Section, Severity, Unknown
from calitrace.checks.objects import iter_numbered
from calitrace.checks.snapshot import Counters, Drops, Link, Missing

HOOKS = {0: "tc ingress", 1: "tc egress", 2: "XDP"}
_TC = (0, 1)
_SOURCES = {"clsact": "clsact", "tcx": "tcx programs (kfree_skb, TC_INGRESS and TC_EGRESS)"}
_HELD = ("FRAG_WAIT",)  # taken from the kernel, and sent when the rest of the packet is there: nothing is lost
_OR_REFUSED = {"BLACK_HOLE": ", or refused where serviceLoopPrevention is Reject"}
_FIXES = {
    "DROPPED_BY_POLICY": "calitrace probe nodeport HOST:PORT --trace  # names the rule; "
    "calitrace maps policy dump IFACE all",
    "UNAUTH_SOURCE": "calitrace drops --reason UNAUTH_SOURCE  # which packets?; compare loadBalancerSourceRanges with "
    "the clients, and the senders of tunnels with the nodes' addresses; kubectl get nodes -o wide",
    "RT_UNKNOWN": "calitrace maps routes dump  # is the backend's address there?",
    "BLACK_HOLE": "calitrace maps nat dump  # does any service have that address and port?",
    "CT_CREATE_FAILED": "calitrace check maps  # is the conntrack map full?",
    "SOURCE_COLLISION_FAILED": "widen bpfPSNATPorts in FelixConfiguration",
}


def calico_reasons(drops: Drops) -> Said:
    """Reads Calico's counters for each interface and hook twice and names the reasons whose packets were dropped.

    Only what rises over the interval is a finding. Reverse path failures, invalid conntrack states, packets in the
    middle of an unknown flow and broken program chains have no counter: drops.silent looks for those.
    """
    if isinstance(drops.counters, Missing):
        yield Unknown(drops.counters.why)
        return
    for each in drops.counters:
        count = len(each.after)
        for code, (before, after) in enumerate(zip(each.before, each.after, strict=False)):
            reason = reasons.name(code, count)
            if after > before and reason in reasons.MEANING and reason not in _HELD:
                yield Finding(
                    Severity.WARNING,
                    f"{each.interface} {HOOKS.get(each.hook, each.hook)}",
                    (f"{reason}: {before} -> {after} within {drops.seconds:g} s",),
                    f"packets are dropped{_OR_REFUSED.get(reason, '')}: {reasons.MEANING[reason]}",
                    _FIXES.get(reason, "calitrace counters 1 -i IFACE").replace("IFACE", each.interface),
                )


def silent(drops: Drops, links: tuple[Link, ...] | None = None) -> Said:
    """Compares the drops of each interface's clsact qdisc (tc -s qdisc show) with Calico's counters for it.

    More drops than counted ones are Calico's silent ones, or another program's on that hook. Interfaces with tcx
    have no such qdisc: there the kernel's drops for that reason are counted meanwhile (Linux 6.6, BCC). Where Calico
    counts nothing (before v3.24) all drops of the qdisc are shown, whatever they are.
    """
    if isinstance(drops.qdiscs, Missing):
        yield Unknown(drops.qdiscs.why)
        return
    unseen = {link.name for link in links or () if link.any_calico} - {each.interface for each in drops.qdiscs}
    if unseen or not drops.qdiscs:
        yield Unknown(
            f"no clsact qdisc on {', '.join(sorted(unseen)[:3]) or 'any interface'}: with tcx the kernel does not "
            "count these drops, and we could not"
        )
    counters: tuple[Counters, ...] = ()
    uncounted = ""
    if isinstance(drops.counters, Missing):
        uncounted = f"Calico's counters: {drops.counters.why}"
    else:
        counters = drops.counters
    for qdisc in drops.qdiscs:
        # What XDP drops does not come to these programs.
        here = (each for each in counters if each.interface == qdisc.interface and each.hook in _TC)
        counted = sum(_drops_counted(each) for each in here)
        dropped = qdisc.after - qdisc.before
        if dropped > counted:
            yield Finding(
                Severity.WARNING,
                qdisc.interface,
                (
                    f"{_SOURCES[qdisc.source]} dropped: {qdisc.before} -> {qdisc.after} within {drops.seconds:g} s",
                    uncounted or f"counted by Calico's reasons in that time: {counted}",
                ),
                "programs on this interface drop packets, by policy or any other reason"
                if uncounted
                else "programs on this interface drop packets without counting them: reverse path, invalid conntrack "
                "state, empty program slot (projectcalico/calico#6739), or another program",
                "calitrace probe nodeport HOST:PORT --trace  # which packets, and why",
            )


def _drops_counted(counters: Counters) -> int:
    """By how much one hook's counters of drops rose; what failed for a collision is counted once."""
    pairs = enumerate(zip(counters.before, counters.after, strict=False))
    count = len(counters.after)
    rose = {reasons.name(code, count): max(after - before, 0) for code, (before, after) in pairs}
    twice = min(rose.get(reasons.COLLISION, 0), rose.get(reasons.NOT_CREATED, 0))
    return sum(by for name, by in rose.items() if name in reasons.MEANING) - twice


def since_boot(drops: Drops) -> Said:
    """Reads Calico's counters and says what they hold now: drops since Calico made them, reason by reason.

    Policy drops are what policy is for and are left out.
    """
    if isinstance(drops.counters, Missing):
        yield Unknown(drops.counters.why)
        return
    lines: dict[str, list[str]] = {}
    for each in drops.counters:
        for code, value in enumerate(each.after):
            reason = reasons.name(code, len(each.after))
            if value and reason in reasons.MEANING and reason not in (*_HELD, "DROPPED_BY_POLICY"):
                lines.setdefault(reason, []).append(f"{each.interface} {HOOKS.get(each.hook, each.hook)}: {value}")
    for reason, places in lines.items():
        yield Finding(
            Severity.INFO,
            reason,
            tuple(iter_numbered((f"{reason} at {place}" for place in places), 4)),
            f"packets were dropped at some time since these counters were made: {reasons.MEANING[reason]}",
            "calitrace check drops --interval 30  # are they still?; " + _FIXES.get(reason, "calitrace counters 1"),
        )


CHECKS = (
    Check("drops.calico-reasons", Section.DROPS, calico_reasons),
    Check("drops.silent", Section.DROPS, silent),
    Check("drops.since-boot", Section.DROPS, since_boot),
)
