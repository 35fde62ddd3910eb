"""What this machine offers, and what is lost without each thing that it does not."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calitrace.calico import state
from calitrace.errors import Error, LayoutMismatch
from calitrace.kernel import discover, headers, mounts, symbols, syscall
from calitrace.kernel.collectors import has_drop_reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calitrace.btf import Btf

# include/uapi/linux/capability.h
_TRACEPOINTS = {
    "kfree_skb": "no drops are seen: nothing can be located",
    "netif_receive_skb": "arrivals at interfaces are not seen",
    "net_dev_queue": "departures from interfaces are not seen",
    "net_dev_xmit": "what the driver said is not seen",
    "consume_skb": "normal ends are not seen",
    "bpf_trace_printk": "Calico's log lines are not joined to packets (the kernel is older than 5.9)",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. *found*: what is there. *lost*: what calitrace cannot do without it; empty when it is fine.

    *essential*: whether nothing works without it. *hint*: what to do.
    """

    name: str
    found: str
    lost: str = ""
    hint: str = ""
    essential: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is lost."""
        return not self.lost


def iter_findings() -> Iterator[Finding]:
    """Look at everything, one thing after the other; a look that fails does not stop the rest."""
    yield from _capabilities()
    yield _bcc()
    types = headers.kernel_btf()
    yield _types(types)
    if types is not None:
        yield from _features(types)
    yield _mount("bpffs", Path("/sys/fs/bpf"), "bpf", "Calico's pinned maps cannot be read")
    yield _symbols()
    yield _lockdown()
    yield from _calico()


def _capabilities() -> Iterator[Finding]:
    for name, held in syscall.capabilities().items():
        yield Finding(
            name,
            "held" if held else "not held",
            "" if held else "BPF programs, raw sockets or namespaces are refused",
            "" if held else "run as root",
            essential=True,
        )


def _bcc() -> Finding:
    if importlib.util.find_spec("bcc") is None:
        return Finding("BCC", "not there", "no BPF program can be compiled", "apt-get install python3-bpfcc", True)
    return Finding("BCC", "python3-bpfcc is there", essential=True)


def _types(types: Btf | None) -> Finding:
    if types is not None:
        return Finding("BTF", f"{len(types):,} kernel types", essential=True)
    build = Path("/lib/modules") / os.uname().release / "build"
    if build.exists():
        return Finding("BTF", f"not there; headers in {build}", "start-up takes seconds; drop reasons have no names")
    return Finding(
        "BTF",
        "neither BTF nor kernel headers",
        "no BPF program can be compiled",
        f"install the headers of {os.uname().release}, or a kernel with CONFIG_DEBUG_INFO_BTF",
        True,
    )


def _features(types: Btf) -> Iterator[Finding]:
    missing = headers.structs_from(types).missing
    yield Finding(
        "kernel structs",
        "all members known" if not missing else f"missing {', '.join(missing)}",
        "" if not missing else "what these hold is not shown",
    )
    for name, lost in _TRACEPOINTS.items():
        there = types.parameters(f"btf_trace_{name}") is not None
        yield Finding(f"tracepoint {name}", "there" if there else "not there", "" if there else lost)
    reason = has_drop_reason(types)
    yield Finding(
        "drop reasons",
        "kfree_skb gives them" if reason else "not given (the kernel is older than 5.17)",
        "" if reason else "drops are told apart by function only",
    )


def _mount(name: str, where: Path, kind: str, lost: str) -> Finding:
    if mounts.filesystem(where) == kind:
        return Finding(name, f"mounted on {where}")
    return Finding(name, f"not mounted on {where}", lost, f"mount -t {kind} {kind} {where}")


def _symbols() -> Finding:
    if not symbols.are_readable():
        return Finding(
            "kernel symbols", "hidden", "drops show addresses, not functions", "sysctl kernel.kptr_restrict=0"
        )
    return Finding("kernel symbols", "readable")


def _lockdown() -> Finding:
    try:
        text = Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        return Finding("kernel lockdown", "not present")
    mode = text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()
    if mode == "confidentiality":
        return Finding("kernel lockdown", mode, "the kernel refuses to read its memory from BPF", "", True)
    return Finding("kernel lockdown", mode)


def _calico() -> Iterator[Finding]:
    try:
        found = discover.topology()
    except (Error, OSError) as failure:
        yield Finding("namespaces", f"cannot be looked at: {failure}", "hops have numbers, not names", "run as root")
        return
    # Not those of role node alone: a node may be no neighbour of this namespace.
    nodes = [n for n in found.namespaces.values() if any(link.calico for link in n.links.values())]
    if not nodes:
        yield Finding(
            "Calico",
            "no Calico tc program on any interface",
            "drops are never Calico's; is eBPF mode on?",
            "calitrace lab up makes a small cluster to try calitrace with",
        )
    for node in nodes:
        hooks = sum(len(link.calico) for link in node.links.values())
        try:
            table = state.layout(node.state_name, node.state_bytes)
            yield Finding(f"Calico on {node.name}", f"{hooks} hooks; {node.state_name} of {table.releases}")
        except LayoutMismatch as unknown:
            yield Finding(
                f"Calico on {node.name}",
                f"{hooks} hooks; {unknown.actual or 'no state map'}",
                "Calico's own reason for a drop is not read",
            )
