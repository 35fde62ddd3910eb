"""Reading what is not ours: JSON objects of the API, kernel releases, interface patterns. Nothing here raises."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from calitrace.calico.felix_config import Setting, Settings, Unset
from calitrace.checks.finding import Severity, Unknown
from calitrace.checks.snapshot import Link, Process, Program, Route

OWN_DEVICES = frozenset(
    {
        *("tunl0", "vxlan.calico", "vxlan-v6.calico", "wireguard.cali", "wg-v6.cali"),
        *("bpfin.cali", "bpfout.cali", "bpfnatin", "bpfnatout", "lo"),
    }
)
_KIND = "FelixConfiguration"
L3_KINDS = frozenset({"wireguard", "tun", "ipip", "gre", "sit"})


def dig(thing: Any, *path: str) -> Any:
    """What is at a path of keys in JSON, or None when something on the way is not there."""
    for step in path:
        if not isinstance(thing, Mapping):
            return None
        thing = thing.get(step)
    return thing


def items(thing: Any, *path: str) -> list[Any]:
    """The list at a path, or an empty one."""
    found = dig(thing, *path)
    return found if isinstance(found, list) else []


def name_of(thing: Any) -> str:
    """``namespace/name``, or the name alone."""
    namespace, name = dig(thing, "metadata", "namespace"), dig(thing, "metadata", "name")
    return f"{namespace}/{name}" if namespace else str(name)


def image_tags(calico_node: Any) -> list[str]:
    """Tags of the images of the DaemonSet calico-node's container; one named by its digest alone has none."""
    containers = items(calico_node, "spec", "template", "spec", "containers")
    images = [str(dig(each, "image")).partition("@")[0] for each in containers if dig(each, "name") == "calico-node"]
    return [image.rpartition("/")[2].partition(":")[2] for image in images]


def calico_environment(calico_node: Any) -> dict[str, str]:
    """What the DaemonSet gives calico-node on every node; variables taken from elsewhere are left out."""
    found = {}
    for container in items(calico_node, "spec", "template", "spec", "containers"):
        for each in items(container, "env") if dig(container, "name") == "calico-node" else ():
            name, value = dig(each, "name"), dig(each, "value")
            if isinstance(name, str) and isinstance(value, str):
                found[name] = value
    return found


def node_addresses(nodes: Iterable[Any], node: str) -> set[str]:
    """Addresses of a node as the API and Calico's annotation have them, without prefix length."""
    found = set()
    for each in nodes:
        if dig(each, "metadata", "name") == node:
            for address in items(each, "status", "addresses"):
                if dig(address, "type") in ("InternalIP", "ExternalIP"):
                    found.add(str(dig(address, "address")))
            annotated = dig(each, "metadata", "annotations", "projectcalico.org/IPv4Address")
            if annotated:
                found.add(str(annotated).partition("/")[0])
    return found


def ways_to(routes: Iterable[Route], addresses: Iterable[str]) -> dict[str, str]:
    """Interfaces by which these addresses are reached, with one each: of the longest prefix, the lowest metric."""
    by_length: dict[int, dict[IPv4Address, list[Route]]] = {}
    for route in routes:
        network = _network(route.dst)
        if network is not None:
            by_length.setdefault(network.prefixlen, {}).setdefault(network.network_address, []).append(route)
    lengths = sorted(by_length, reverse=True)
    found: dict[str, str] = {}
    for address in sorted(addresses):
        target = _network(address)
        if target is None:
            continue
        nets = ((n, target.supernet(new_prefix=n).network_address) for n in lengths if n <= target.prefixlen)
        ways = next((by_length[n][net] for n, net in nets if net in by_length[n]), [])
        lowest = min((route.metric for route in ways), default=0)
        for route in ways:
            if route.metric == lowest:
                found.setdefault(route.interface, address)
    return found


def _network(text: str) -> IPv4Network | None:
    try:
        return IPv4Network("0.0.0.0/0" if text == "default" else text)
    except ValueError:  # IPv6, or a word
        return None


def peers(nodes: Iterable[Any], node: str) -> set[str]:
    """Addresses of the other nodes, as `node_addresses` has them."""
    names = {str(dig(each, "metadata", "name")) for each in nodes} - {node}
    return {address for each in names for address in node_addresses(nodes, each)}


def ebpf_on(links: Iterable[Link]) -> bool:
    """Whether any interface carries a Calico program."""
    return any(link.any_calico for link in links)


def carriers(
    links: Iterable[Link], routes: Iterable[Route], addresses: set[str], peer_ways: Mapping[str, str]
) -> list[Link]:
    """Interfaces through which traffic enters and leaves the node: a gateway or other nodes are behind them, or they
    bear a node's address. Calico's own devices and pods' interfaces are none.
    """
    ways = {route.interface for route in routes if route.gateway or route.dst == "default"} | peer_ways.keys()
    return [
        link
        for link in links
        if link.name not in OWN_DEVICES
        and not link.workload
        and (link.name in ways or any(address.partition("/")[0] in addresses for address in link.addresses))
    ]


def uplinks(
    links: Iterable[Link],
    routes: Iterable[Route],
    addresses: set[str],
    peer_ways: Mapping[str, str] | None = None,
) -> list[Link] | Unknown:
    """The `carriers`, or else the host's interfaces that carry Calico's programs: those are what Felix takes for its
    data interfaces. Where there is neither, nothing can be said of them.
    """
    every = list(links)
    return (
        carriers(every, routes, addresses, peer_ways or {})
        or [each for each in every if each.any_calico and not each.workload and each.name not in OWN_DEVICES]
        or Unknown("no interface has a gateway behind it, a node's address, or Calico's programs")
    )


def grave(
    link: Link, routes: Iterable[Route], addresses: set[str], peer_ways: Mapping[str, str] | None = None
) -> Severity:
    """How grave a fault on a carrier is: an error where the default route, a node's address or other nodes are."""
    default = any(route.dst == "default" and route.interface == link.name for route in routes)
    own = any(address.partition("/")[0] in addresses for address in link.addresses)
    return Severity.ERROR if default or own or link.name in (peer_ways or {}) else Severity.WARNING


def data_pattern(felix: Settings) -> tuple[re.Pattern[str], str] | Unknown:
    """bpfDataIfacePattern, compiled, and where it comes from."""
    setting = felix.get("bpfDataIfacePattern")
    if isinstance(setting, Unset):
        return Unknown(setting.why)
    try:
        return re.compile(str(setting.value)), str(setting)
    except re.error as wrong:
        return Unknown(f"{setting}: not a pattern that Python understands: {wrong}")


def l3_pattern(felix: Settings) -> re.Pattern[str] | None:
    """bpfL3IfacePattern, compiled; None when it is empty, unknown or malformed."""
    setting = felix.get("bpfL3IfacePattern")
    if isinstance(setting, Unset) or not setting.value:
        return None
    try:
        return re.compile(str(setting.value))
    except re.error:
        return None


def hooks(link: Link) -> str:
    """What is at an interface's hooks, in words: ``ingress: cali_tc_preambl; egress: nothing``."""
    return "; ".join(f"{hook}: {_names(link.programs.get(hook, ()))}" for hook in ("ingress", "egress"))


def _names(programs: tuple[Program, ...]) -> str:
    return ", ".join(f"{each.name} (id {each.id})" for each in programs) or "nothing"


def detach(name: str) -> str:
    """The commands that take all programs off an interface: those of tc, and those of tcx, which Felix pins (v3.31)."""
    pins = " ".join(f"/sys/fs/bpf/tcx/{name.replace('.', '')}_{hook}" for hook in ("ingress", "egress"))
    return f"tc qdisc del dev {name} clsact; rm -f {pins}  # tcx"


def kernel_version(release: str) -> tuple[int, ...] | None:
    """(5, 15, 0) of "5.15.0-91-generic"; with the number behind the hyphen as a fourth where there is one."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-(\d+))?", release)
    return None if match is None else tuple(int(part) for part in match.groups(default="0"))


def patch(spec: str, now: Setting | Unset | None = None) -> str:
    """The command that changes Felix's settings. *spec*: JSON of the fields. *now*: the setting that is to change, for
    what it comes from wins over what it does not: the node's own FelixConfiguration, the environment.
    """
    origin = now.origin if isinstance(now, Setting) else ""
    where, _, name = origin.partition(" ")
    command = f"kubectl patch felixconfiguration {name if where == _KIND else 'default'} --type merge -p "
    unset = f"kubectl set env -n calico-system daemonset/calico-node {origin}-; " if origin.startswith("FELIX_") else ""
    return f"{unset}{command}'{{\"spec\":{{{spec}}}}}'"


RESTART = (
    "kubectl delete pod -n calico-system -l k8s-app=calico-node --field-selector spec.nodeName=NODE  "
    "# restarts calico-node"
)
KUBE_PROXY_OFF = (
    "kubectl patch ds -n kube-system kube-proxy --type merge -p "
    """'{"spec":{"template":{"spec":{"nodeSelector":{"non-calico":"true"}}}}}'"""
)


def kube_proxies(processes: tuple[Process, ...]) -> list[Process] | Unknown:
    """The kube-proxies; that there is none is believed only where a kubelet is in sight."""
    found = [each for each in processes if each.name == "kube-proxy"]
    if not found and not any(each.name == "kubelet" for each in processes):
        return Unknown("no process kubelet in sight: it is not known whether kube-proxy would be")
    return found


def proxy_chains(chains: tuple[str, ...]) -> list[str]:
    """The chains that kube-proxy makes with iptables."""
    return [each for each in chains if each.startswith(("KUBE-SVC-", "KUBE-SEP-", "KUBE-SERVICES", "KUBE-EXT-"))]


def proxy_rules(links: tuple[Link, ...], chains: tuple[str, ...]) -> list[str]:
    """What a kube-proxy, of any name and any mode, makes in the kernel; it stays when the process goes."""
    mine = proxy_chains(chains) + [each for each in chains if each.startswith("kube-proxy/")]
    held = [link for link in links if link.name == "kube-ipvs0" and link.addresses]
    found = [f"kube-ipvs0: {len(link.addresses)} addresses" for link in held]
    return [*found, *([f"{len(mine)} chains of kube-proxy"] if mine else []), *iter_numbered(mine, 3)]


def widened(felix: Settings, field: str, name: str) -> str:
    """The command that lets a pattern for interfaces match one more."""
    setting = felix.get(field)
    value = setting.value if isinstance(setting, Setting) else None
    own = f"^{re.escape(name)}$"
    return patch(f'"{field}":{json.dumps(f"{value}|{own}" if value else own)}', setting)


def grep_log(pattern: str) -> str:
    """The command that looks for lines in calico-node's log; with a selector kubectl shows 10 lines unless told."""
    return (
        f"kubectl logs -n calico-system -l k8s-app=calico-node -c calico-node --prefix --tail=-1 | grep -i '{pattern}'"
    )


def iter_numbered(lines: Iterable[str], most: int) -> Iterator[str]:
    """The first *most*, and how many more there are."""
    every = list(lines)
    yield from every[:most]
    if len(every) > most:
        yield f"and {len(every) - most} more"
