"""Classic tc filters (clsact) and the BPF programs behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HOOKS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
# enum in include/uapi/linux/pkt_cls.h; pyroute2 up to 0.9 stops before the program's id.
_LATER_ATTRIBUTES = (("TCA_BPF_FLAGS_GEN", "uint32"), ("TCA_BPF_TAG", "hex"), ("TCA_BPF_ID", "uint32"))


def iter_programs(route: Any, index: int) -> Iterator[tuple[str, str, int, int]]:
    """(hook, name of the filter, program id, priority) of an interface, in the order in which they run.

    *route*: an ``IPRoute`` of the namespace.
    """
    _teach_attributes()
    for hook, parent in HOOKS.items():
        for message in route.get_filters(index=index, parent=parent):
            options = message.get_attr("TCA_OPTIONS")
            identifier = options.get_attr("TCA_BPF_ID") if options is not None else None
            if message.get_attr("TCA_KIND") == "bpf" and identifier:
                yield hook, options.get_attr("TCA_BPF_NAME") or "", int(identifier), message["info"] >> 16


def _teach_attributes() -> None:
    from pyroute2.netlink.rtnl.tcmsg.sched_bpf import options

    known = {name for name, *_ in options.nla_map}
    fresh = tuple(each for each in _LATER_ATTRIBUTES if each[0] not in known)
    if fresh:
        options.nla_map += fresh
        options().compile_nla_table()  # it may have been compiled already, by whoever used pyroute2 before
