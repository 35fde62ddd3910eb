"""Classic tc filters (clsact, and ingress alone) and the BPF programs behind them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from calitrace.kernel import syscall

HOOKS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
# enum in include/uapi/linux/pkt_cls.h; pyroute2 up to 0.9 stops before the program's id.
_LATER_ATTRIBUTES = (("TCA_BPF_FLAGS_GEN", "uint32"), ("TCA_BPF_TAG", "hex"), ("TCA_BPF_ID", "uint32"))


_QDISCS = {"clsact": tuple(HOOKS), "ingress": ("ingress",)}


class Filter(NamedTuple):
    """One filter. *kind*: bpf, flower, matchall, u32 …; *program*: id of its BPF program, 0 for none.

    *name*: what whoever attached a BPF program called it.
    """

    hook: str
    kind: str
    name: str
    program: int
    priority: int


def interface_name(link: Any) -> str:
    """The name in a message about an interface: pyroute2 leaves one as bytes that is no UTF-8."""
    name: bytes | str = link.get_attr("IFLA_IFNAME")
    return os.fsdecode(name)


def hooks(route: Any) -> dict[int, tuple[str, ...]]:
    """The hooks of each interface that may have filters. *route*: an ``IPRoute`` of the namespace."""
    found: dict[int, tuple[str, ...]] = {}
    for qdisc in route.get_qdiscs():
        found[qdisc["index"]] = found.get(qdisc["index"], ()) + _QDISCS.get(qdisc.get_attr("TCA_KIND"), ())
    return found


def iter_filters(route: Any, index: int, at: Iterable[str] = HOOKS) -> Iterator[Filter]:
    """All filters at these hooks of an interface, in the order in which they run."""
    _teach_attributes()
    for hook in at:
        for message in route.get_filters(index=index, parent=HOOKS[hook]):
            if not message["handle"]:
                continue  # the head of those with its priority
            kind, options = message.get_attr("TCA_KIND"), message.get_attr("TCA_OPTIONS")
            program, name = 0, ""
            if kind == "bpf" and options is not None:
                program, name = int(options.get_attr("TCA_BPF_ID") or 0), options.get_attr("TCA_BPF_NAME") or ""
            yield Filter(hook, kind, name, program, message["info"] >> 16)


def program_ids(route: Any, index: int, at: Iterable[str] = HOOKS) -> dict[str, list[int]]:
    """Ids of the BPF programs at each hook of an interface, in the order in which they run: tcx comes before tc.

    *at*: hooks that may have filters. Raises PermissionError where tcx may not be looked at.
    """
    found = {hook: tcx_programs(index, hook) for hook in HOOKS}
    for each in iter_filters(route, index, at):
        if each.program:
            found[each.hook].append(each.program)
    return found


def tcx_programs(index: int, hook: str) -> list[int]:
    """Ids of the tcx programs of an interface of this thread's namespace; none before Linux 6.6, or when it has gone.

    Raises PermissionError.
    """
    try:
        return syscall.attached_programs(index, hook)
    except PermissionError:
        raise
    except OSError:
        return []


def _teach_attributes() -> None:
    from pyroute2.netlink.rtnl.tcmsg.sched_bpf import options

    known = {name for name, *_ in options.nla_map}
    fresh = tuple(each for each in _LATER_ATTRIBUTES if each[0] not in known)
    if fresh:
        options.nla_map += fresh
        options().compile_nla_table()  # it may have been compiled already, by whoever used pyroute2 before
