"""What the lab consists of: names, addresses, links and services. Plain data, no kernel.

A client and two nodes hang on one bridge; each node has one pod::

    client eth0 ── fabric ──┬── ens192 node-a cali1a2b3c4d5e6 ── eth0 pod-a
                            └── eth0   node-b calif00dbeef012 ── eth0 pod-b

Interface names differ between the nodes on purpose: nobody may take an interface name for a node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from calitrace.errors import UsageError

RUNTIME = Path("/run/calitrace")
BPFFS = Path("/sys/fs/bpf")
DEFAULT_NAME = "calitrace"
CLIENT, FABRIC = "client", "fabric"
BRIDGE = "fabric"
GATEWAY = "169.254.1.1"  # every Calico pod's next hop; proxy ARP on the host side answers for it
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"  # the address Felix gives every host-side veth
PREFIX = 24
UNDERLAY_MTU = 1500
VXLAN_OVERHEAD = 50
VXLAN_PORT = 4789
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?")


@dataclass(frozen=True)
class Attached:
    """A namespace with a leg in the fabric. The fabric's port bears the namespace's short name."""

    name: str
    interface: str
    address: str
    mac: str


@dataclass(frozen=True)
class Node(Attached):
    """A Kubernetes node with one pod. *pod_cidr*: what the other node routes to it."""

    pod: str
    pod_address: str
    pod_mac: str
    pod_cidr: str
    workload: str


@dataclass(frozen=True)
class Service:
    """A NodePort. *id* is Calico's service id; *backend* is None for a service without endpoints."""

    id: int
    proto: str
    node_port: int
    backend: tuple[str, int] | None
    purpose: str


OUTSIDE = Attached(CLIENT, "eth0", "10.10.0.100", "02:ca:11:00:00:64")
NODE_A = Node(
    "node-a", "ens192", "10.10.0.1", "02:ca:11:00:00:01",
    "pod-a", "10.65.0.2", "02:ca:11:65:00:02", "10.65.0.0/26", "cali1a2b3c4d5e6",
)  # fmt: skip
NODE_B = Node(
    "node-b", "eth0", "10.10.0.2", "02:ca:11:00:00:02",
    "pod-b", "10.65.1.2", "02:ca:11:65:01:02", "10.65.1.0/26", "calif00dbeef012",
)  # fmt: skip
NODES = (NODE_A, NODE_B)
ATTACHED = (OUTSIDE, *NODES)
PARTS = (CLIENT, FABRIC, *(node.name for node in NODES), *(node.pod for node in NODES))

ECHO_PORT, UDP_PORT, HTTP_PORT = 8080, 5353, 8000
SERVICES = (
    Service(1, "tcp", 30080, (NODE_B.pod_address, ECHO_PORT), "echo, pod on the other node"),
    Service(2, "tcp", 30081, (NODE_A.pod_address, ECHO_PORT), "echo, pod on node-a"),
    Service(3, "tcp", 30082, None, "no endpoints"),
    Service(4, "udp", 30053, (NODE_B.pod_address, UDP_PORT), "echo, pod on the other node"),
    Service(5, "udp", 30054, (NODE_A.pod_address, UDP_PORT), "echo, pod on node-a"),
    Service(7, "tcp", 30087, ("10.77.0.9", 8080), "backend without a route"),
    Service(8, "tcp", 30088, (NODE_B.pod_address, HTTP_PORT), "HTTP, pod on the other node"),
    Service(9, "tcp", 30089, (NODE_A.pod_address, HTTP_PORT), "HTTP, pod on node-a"),
)


@dataclass(frozen=True)
class Lab:
    """The names of one lab on this machine. Raises UsageError for a name that cannot be used."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"{self.name!r} cannot be a lab's name",
                "use up to 24 lower-case letters, digits and inner hyphens",
            )

    def namespace(self, part: str) -> str:
        """The network namespace of ``client``, ``fabric``, ``node-a``, ``node-b``, ``pod-a`` or ``pod-b``."""
        if part not in PARTS:
            raise UsageError(f"the lab has no {part!r}", f"choose one of {', '.join(PARTS)}")
        return f"{self.name}-{part}"

    def command(self, words: str) -> str:
        """The command line that does it to this lab: ``calitrace lab down --name second``."""
        return f"calitrace lab {words}" + ("" if self.name == DEFAULT_NAME else f" --name {self.name}")

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(self.namespace(part) for part in PARTS)

    @property
    def state_file(self) -> Path:
        return RUNTIME / f"lab-{self.name}.json"

    @property
    def lock_file(self) -> Path:
        return RUNTIME / f"lab-{self.name}.lock"

    @property
    def directory(self) -> Path:
        """Files of the running lab: what Felix keeps below /var/run/calico, and the servers' complaints."""
        return RUNTIME / self.name

    @property
    def pins(self) -> Path:
        return BPFFS / "calitrace" / self.name

    def policy_directory(self, node: str) -> Path:
        """Stands for the node's /var/run/calico/bpf/policy."""
        return self.directory / node / "policy"
