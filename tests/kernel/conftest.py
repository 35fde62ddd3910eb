"""Two namespaces joined by a veth, with a tc program of the test's own on it."""

from __future__ import annotations

import errno
import itertools
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute
from pyroute2 import netns as pyroute_netns

from calitrace.kernel import headers, loader, netns, syscall
from tests.conftest import of_a_dead_run

if TYPE_CHECKING:
    from collections.abc import Iterator

_serial = itertools.count()
HOOKS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_LINK_CREATE, _TCX = 28, {"ingress": 46, "egress": 47}  # include/uapi/linux/bpf.h


@dataclass(frozen=True)
class Pair:
    """*left* 192.0.2.1 on ``left0`` and *right* 192.0.2.2 on ``right0``: namespace names."""

    left: str
    right: str
    left_ip: str = "192.0.2.1"
    right_ip: str = "192.0.2.2"

    def attach(self, bpf: Any, function: str, namespace: str, interface: str, hook: str) -> None:
        """Attach a compiled classifier to a clsact hook."""
        program = bpf.load_func(function.encode(), bpf.SCHED_CLS)
        with netns.inside(namespace), IPRoute() as route:
            index = route.link_lookup(ifname=interface)[0]
            if not any(q.get_attr("TCA_KIND") == "clsact" for q in route.get_qdiscs(index=index)):
                route.tc("add", "clsact", index)
            route.tc(
                "add-filter",
                "bpf",
                index,
                fd=program.fd,
                name=function,
                parent=HOOKS[hook],
                classid=1,
                direct_action=True,
            )

    @contextmanager
    def attached_by_tcx(
        self, bpf: Any, function: str, namespace: str, interface: str, hook: str = "ingress"
    ) -> Iterator[None]:
        """A compiled classifier at a tcx hook, by a link that goes at the end."""
        program = bpf.load_func(function.encode(), bpf.SCHED_CLS)
        attr = syscall.Attr()
        with netns.inside(namespace), IPRoute() as route:
            attr.u32[0:3] = (program.fd, route.link_lookup(ifname=interface)[0], _TCX[hook])
            try:
                link = syscall.call(_LINK_CREATE, attr)
            except OSError as refused:
                types = headers.kernel_btf()
                known = (types.enum("bpf_attach_type") or {}).values() if types else ()
                if refused.errno != errno.EINVAL or "BPF_TCX_INGRESS" in known:  # then the call itself is wrong
                    raise
                pytest.skip(f"this kernel has no tcx: {refused.strerror}")
        try:
            yield
        finally:
            os.close(link)


def remove_namespaces_of_dead_runs() -> None:
    """Of a run that was killed the namespaces stay."""
    for name in sorted(each.name for each in netns.RUN_NETNS.iterdir()) if netns.RUN_NETNS.is_dir() else ():
        if re.match(r"(ct-left-|ct-right-|dataplane)\d", name) and of_a_dead_run(name):
            pyroute_netns.remove(name)


@pytest.fixture(scope="session", autouse=True)
def _clean() -> None:
    if os.geteuid() == 0:
        remove_namespaces_of_dead_runs()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A fresh pair of namespaces; gone afterwards."""
    number = f"{os.getpid()}-{next(_serial)}"
    found = Pair(f"ct-left-{number}", f"ct-right-{number}")
    made = []
    try:
        for name in (found.left, found.right):
            pyroute_netns.create(name)
            made.append(name)
        with netns.inside(found.left), IPRoute() as route:
            route.link(
                "add",
                ifname="left0",
                kind="veth",
                peer={"ifname": "right0", "net_ns_fd": str(netns.path(found.right))},
            )
        for name, interface, address in (
            (found.left, "left0", found.left_ip),
            (found.right, "right0", found.right_ip),
        ):
            with netns.inside(name), IPRoute() as route:
                index = route.link_lookup(ifname=interface)[0]
                route.addr("add", index=index, address=address, prefixlen=24)
                route.link("set", index=index, state="up")
                route.link("set", index=1, state="up")
        # Known neighbours: a program that drops everything would drop ARP too.
        macs = {}
        for name, interface in ((found.left, "left0"), (found.right, "right0")):
            with netns.inside(name), IPRoute() as route:
                macs[name] = route.get_links(ifname=interface)[0].get_attr("IFLA_ADDRESS")
        for name, interface, address, peer in (
            (found.left, "left0", found.right_ip, found.right),
            (found.right, "right0", found.left_ip, found.left),
        ):
            with netns.inside(name), IPRoute() as route:
                index = route.link_lookup(ifname=interface)[0]
                route.neigh("add", dst=address, lladdr=macs[peer], ifindex=index, state="permanent")
        yield found
    finally:
        for name in made:
            pyroute_netns.remove(name)


def compile_tc(text: str) -> Any:
    """Compile a test's own classifiers."""
    return loader.compile_bpf(text)
