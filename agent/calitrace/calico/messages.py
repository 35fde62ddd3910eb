"""Every message that Calico's BPF programs print at level Debug or Info, with the releases that print it.

Sources: felix/bpf-gpl of v3.13 to master (tc.c, conntrack.h, nat_lookup.h, fib_co_re.h, fib_legacy.h, rpf.h, icmp*.h,
parsing*.h, connect_balancer.h, conntrack_cleanup.c, tc_preamble.c, xdp.c), and traces of programs of v3.17, v3.28 and
master. *since* and *until* bound the releases as far as those tell; the reader takes every wording from every release.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING

from calitrace.calico.reasons import IPIP_OF_A_POD, IPIP_OF_NO_NODE, NOT_IN_SOURCE_RANGES, VXLAN_OF_NO_NODE

if TYPE_CHECKING:
    from collections.abc import Mapping

STAGES = {
    "start": "a program begins with a packet",
    "parse": "headers are read",
    "tunnel": "VXLAN or IPIP is recognised and taken off",
    "conntrack": "the flow is looked up",
    "nat": "service and backend are looked up",
    "rpf": "the reverse path of the source is checked",
    "policy": "policy is asked",
    "accepted": "what is known after policy",
    "entry": "a conntrack entry is made or changed",
    "rewrite": "addresses, ports and checksums are changed",
    "encap": "the packet is put into VXLAN",
    "fib": "the way out is looked up",
    "icmp": "Calico answers with ICMP or a TCP RST",
    "fragment": "fragments are collected",
    "limit": "limits of rate and connections",
    "maglev": "consistent hashing to backends",
    "end": "the result",
    "preamble": "the small program in front, which calls the others",
    "log-action": "the Log action of a policy",
    "connect-time": "connect-time load balancing, in a socket call",
    "cleaner": "the conntrack cleaner",
}
_KINDS = {
    "d": r"-?\d+",
    "x": r"[0-9a-f]+",
    "ip": r"\S+?",  # a word, where a paste has one for the address
    "w": r"\S+",
    "t": r".*",
}
_FIELD = re.compile(r"\{(\w+):(\w+)\}")
DOTTED_SINCE = (3, 30)


@dataclass(frozen=True, slots=True)
class Message:
    """One wording. *template*: the text after the tag, with ``{name:kind}`` for what varies.

    Kinds: d decimal, x hexadecimal, ip an address (hexadecimal up to v3.29, dotted or bracketed since), w a word,
    t the rest of the line. *until*: empty while master prints it. *cause*: what dropped the packet, where the line says
    so. *tagged*: False for lines without a tag.
    """

    stage: str
    template: str
    meaning: str
    since: str = "v3.13"
    until: str = ""
    cause: str = ""
    tagged: bool = True


_NEW, _OLD = "v3.30", "v3.29"
NO_ROOM = "the conntrack entry could not be made: the table is full or clashes"
CHAIN = "a program of Calico's tail-call chain is missing"
_RPF = "the source is not this workload's (reverse path)"
_PREAMBLE = "Calico's preamble cannot enter its programs: all packets of the interface are dropped"

MESSAGES = (
    # start
    Message("start", "New packet at ifindex={ifindex:d}; mark={mark:x}", "the first line of a packet", "v3.18"),
    Message("start", "New packet; mark={mark:x}", "the first line of a packet", "v3.18", "v3.19"),
    Message("start", "Packet approved for forward.", "another program approved it: nothing more to do"),
    Message("start", "Packet pre-approved by another hook, allow.", "another program approved it", "v3.13", "v3.17"),
    Message("start", "Packet approved for forward - src ip fixup", "back into the tunnel: the source becomes the node's", until="v3.25"),
    Message("start", "src ip fixup not needed {ip:ip}", "the source is the node's already", until="v3.25"),
    Message("start", "src ip fixup {ip:ip}", "the source becomes the node's", until="v3.25"),
    *(
        Message("start", text, meaning, since, until, tagged=tagged)
        for tagged, since, until in ((True, "v3.20", "v3.26"), (False, "v3.27", ""))
        for text, meaning in (
            ("No metadata is shared by XDP", "no untracked policy spoke: the usual case"),
            ("Received metadata from XDP: {flags:d}", "an untracked policy accepted it"),
        )
    ),
    Message("start", "State map lookup failed: PASS", "XDP: left to the tc programs"),
    Message("start", "Inbound failsafe port: {port:d}. Skip policy", "XDP: failsafeInboundHostPorts"),
    Message("start", "Outbound failsafe port: {port:d}. Skip policy", "XDP: failsafeOutboundHostPorts"),
    Message("start", "Entering calico_xdp_accepted_entrypoint", "an untracked policy accepted it"),
    Message("start", "Entering calico_xdp_drop", "an untracked policy denied it", cause="denied by policy"),
    Message("start", "Entering normal policy tail call: PASS", "XDP: no untracked policy"),
    Message("start", "Failed to set metadata for TC", "the tc program will not know that XDP accepted it"),
    Message("start", "Set metadata for TC: {flags:d}", "the tc program will know that XDP accepted it", "v3.20"),
    Message("start", "Failed to add space for metadata: {error:d}", "the driver has no room for it", "v3.20"),
    Message("start", "No enough space for metadata", "the driver has no room for it", "v3.20"),
    Message("start", "State map lookup failed: no event generated", "XDP: the state map cannot be read", "v3.24", cause="Calico's state map cannot be read"),
    Message("start", "Allowing because it is not UDP", "the program on lo is for UDP", "v3.25"),
    Message("start", "Fetching metadata from XDP not supported in this hook", "not an ingress of a host interface", "v3.20"),
    Message("start", "Setting metadata is not supported in TC", "not an XDP program", "v3.20"),
    # parse
    Message("parse", "IP id={id:d}", "identification of the IPv4 header", "v3.25", _OLD),
    Message("parse", "IP id={id:d} len={len:d}", "identification and total length", _NEW),
    Message("parse", "IP id={id:d} s={src:ip} d={dst:ip}", "identification and addresses", "v3.13", "v3.24"),
    Message("parse", "IP s={src:ip} d={dst:ip}", "source and destination of the outermost header", "v3.25"),
    Message("parse", "IP ihl={ihl:d} bytes", "length of the IPv4 header; more than 20 means options", "v3.25"),
    Message("parse", "TCP; ports: s={sport:d} d={dport:d}", "TCP ports"),
    Message("parse", "UDP; ports: s={sport:d} d={dport:d}", "UDP ports"),
    Message("parse", "ICMP; type={type:d} code={code:d}", "ICMP"),
    Message("parse", "ICMPV6; type={type:d} code={code:d}", "ICMPv6", "v3.25"),
    Message("parse", "Unknown protocol ({proto:d}), unable to extract ports", "neither TCP, UDP nor ICMP"),
    Message("parse", "Unknown protocol from workload.", "neither TCP, UDP nor ICMP, from or to a pod", "v3.18", "v3.19", "a protocol that Calico does not know, from or to a pod"),
    Message("parse", "ARP: allowing packet", "ARP passes"),
    Message("parse", "Unknown ethertype ({ethertype:x}), drop", "not IP, from or to a pod: VLAN tags on a matched device", cause="not an IP packet, from or to a pod"),
    Message("parse", "Drop malformed or unsupported packet", "headers that make no sense", cause="malformed or unsupported packet"),
    Message("parse", "Drop malformed IP packets", "headers that make no sense", cause="malformed IP packet"),
    Message("parse", "Drop packets with IP options", "IPv4 options from or to a pod", "v3.14", "v3.26", "IP options are not supported"),
    Message("parse", "IPv6 from workload: drop", "IPv6 is off in Felix", cause="IPv6 traffic of a pod while IPv6 is off"),
    Message("parse", "IPv6 to workload: drop", "IPv6 is off in Felix", cause="IPv6 traffic of a pod while IPv6 is off"),
    Message("parse", "Too short{rest:t}", "fewer bytes than the headers need", cause="the packet is too short"),
    Message("parse", "Bad L4 proto{rest:t}", "a protocol where none can be", cause="malformed packet"),
    Message("parse", "Pulling {bytes:d} bytes.", "the headers are made linear"),
    Message("parse", "Pull failed (min len)", "the headers could not be made linear"),
    Message("parse", "Pull failed (TCP len)", "the headers of TCP could not be made linear: those of UDP are next", until="v3.17"),
    Message("parse", "Pull failed (UDP len)", "the headers could not be made linear", until="v3.17"),
    Message("parse", "Pulled data", "the headers were made linear"),
    Message("parse", "Too short to have {bytes:d} bytes for next header", "XDP: fewer bytes than the headers need", cause="the packet is too short"),
    Message("parse", "Unknown ethertype on host interface ({ethertype:x}), allow", "not IP, on a host interface"),
    Message("parse", "IPv6 on host interface: allow", "IPv6 is off in Felix"),
    Message("parse", "IPIP: allow", "IPIP on a host interface", until="v3.17"),
    Message("parse", "IPv4 on host interface: allow", "a program for IPv6 saw IPv4", "v3.25"),
    Message("parse", "Unexpected ipv4 packet, drop", "a program for IPv6 saw IPv4", "v3.25", cause="IPv4 in a program for IPv6"),
    Message("parse", "IPv6 packet, continue with parsing it.", "IPv6", "v3.20", "v3.24"),
    Message("parse", "IPv6 to/from workload: drop", "IPv6 is off in Felix", "v3.25", cause="IPv6 traffic of a pod while IPv6 is off"),
    Message("parse", "Allow packets with IP options and dst IP = hostIP", "IPv4 options for the node itself", "v3.14", "v3.26"),
    Message("parse", "Finished parsing IPv6 extension", "IPv6 extension headers", "v3.20", "v3.26"),
    Message("parse", "Too many IPv6 extensions", "more than the program follows", "v3.20", "v3.26", cause="too many IPv6 extension headers"),
    Message("parse", "ip->nexthdr {header:d} IPv6 options!", "IPv6 extension headers", "v3.25"),
    Message("parse", "loading extension at offset {offset:d}", "an IPv6 extension header", "v3.25"),
    Message("parse", "ext nexthdr {header:d} hdrlen {len:d}", "an IPv6 extension header", "v3.25"),
    Message("parse", "IP ihl={ihl:d} bytes ip nexthdr {header:d}", "length of all IPv6 headers, and what follows", "v3.25"),
    Message("parse", "reading inner ipv6 at {offset:d}", "the packet in an ICMPv6 error", "v3.25"),
    Message("parse", "ipv6 next hdr: {header:d}", "of the packet in an ICMPv6 error", "v3.25"),
    Message("parse", "allow ICMPv6 type {type:d}", "neighbour discovery and the like", "v3.25"),
    Message("parse", "VXLAN packet to unknown dest, fall through to policy.", "VXLAN to no known node"),
    Message("parse", "VXLAN packet to unknown dest, fall through to policy. {rest:t}", "VXLAN to no known node"),
    Message("parse", "Failed to revalidate packet size", "fewer bytes than the headers need", cause="the packet is too short"),
    # tunnel
    Message("tunnel", "VXLAN tunnel packet to {dst:ip} (host IP={host:ip})", "VXLAN for this node"),
    Message("tunnel", "ARP update for ifindex {ifindex:d} ip {ip:ip}", "the peer's MAC is remembered for the way back"),
    Message("tunnel", "vxlan decap", "VXLAN is taken off"),
    Message("tunnel", "vxlan decap origin {ip:ip}", "the node that sent it"),
    Message("tunnel", "VXLAN packet to known Calico host, allow.", "VXLAN between nodes passes policy", "v3.20"),
    Message("tunnel", "VXLAN packet from known Calico host, allow.", "VXLAN between nodes passes policy", "v3.20"),
    Message("tunnel", "VXLAN with our VNI ({vni:w}) from unexpected source.", "a NodePort's tunnel from no known node", cause=VXLAN_OF_NO_NODE),
    Message("tunnel", "VXLAN with our VNI from unexpected source.", "a NodePort's tunnel from no known node", until="v3.27", cause=VXLAN_OF_NO_NODE),
    Message("tunnel", "VXLAN with our VNI but incorrect checksum.", "the outer UDP checksum must be 0", cause=VXLAN_OF_NO_NODE),
    Message("tunnel", "VXLAN with our VNI ({vni:w}) from non-calico source.", "overlay VXLAN from no known node: policy decides"),
    Message("tunnel", "VXLAN: Not our VNI {vni:w}", "somebody else's VXLAN on our port: policy decides"),
    Message("tunnel", "VXLAN: Not our VNI", "somebody else's VXLAN on our port: policy decides", "v3.26"),
    Message("tunnel", "VXLAN: non-tunnel calico", "VXLAN between nodes, but no NodePort's: passes policy", "v3.26"),
    Message("tunnel", "VXLAN decap: too short", "fewer bytes than the headers need", until="v3.17", cause="the packet is too short"),
    Message("tunnel", "VXLAN: Invalid VNI", "a VXLAN header without VNI: policy decides"),
    Message("tunnel", "IPIP packet from known Calico host, allow.", "IPIP between nodes passes policy"),
    Message("tunnel", "IPIP packet to known Calico host, allow.", "IPIP between nodes passes policy"),
    Message("tunnel", "IPIP packet from unknown source, drop.", "IPIP from no known node", cause=IPIP_OF_NO_NODE),
    Message("tunnel", "IPIP packet to unknown dest, drop.", "IPIP to no known node", cause=IPIP_OF_NO_NODE),
    Message("tunnel", "IPIP traffic to/from tunnel: drop", "IPIP inside a tunnel", cause="IPIP inside a tunnel"),
    Message("tunnel", "IPIP traffic from workload: drop", "a pod sends IPIP", cause=IPIP_OF_A_POD),
    Message("tunnel", "dropping tunnel pkt with changed source node", "the same flow through another node", "v3.13", "v3.31", "the flow now comes through another node"),
    Message("tunnel", "dropping non-maglev tunnel pkt with changed source node", "the same flow through another node", "v3.32", cause="the flow now comes through another node"),
    # conntrack
    Message("conntrack", "CT: lookup from {src:ip}:{sport:d}", "the flow's source", "v3.25"),
    Message("conntrack", "CT: lookup to   {dst:ip}:{dport:d}", "the flow's destination", "v3.25"),
    Message("conntrack", "CT-{proto:d} lookup from {src:ip}:{sport:d}", "the flow's source", until="v3.24"),
    Message("conntrack", "CT-{proto:d} lookup to   {dst:ip}:{dport:d}", "the flow's destination", until="v3.24"),
    Message("conntrack", "CT-{proto:d} Packet is a SYN, short-circuiting lookup.", "a SYN is a new flow", until="v3.17"),
    Message("conntrack", "CT: packet is SYN", "the packet begins a connection", "v3.25"),
    Message("conntrack", "CT-{proto:d} packet is SYN", "the packet begins a connection", "v3.18", "v3.24"),
    Message("conntrack", "Forcing policy on SYN", "policy is asked although the flow is known", "v3.25"),
    Message("conntrack", "CT Hit", "the flow is known", "v3.25"),
    *(
        Message("conntrack", f"{prefix} {text}", meaning, *releases)
        for prefix, releases in (("CT:", ("v3.25", "")), ("CT-{proto:d}", ("v3.13", "v3.24")))
        for text, meaning in (
            ("Hit! NORMAL entry.", "a known flow without NAT"),
            ("Hit! NAT FWD entry, doing secondary lookup.", "towards a service: the entry of the real flow is next"),
            ("Hit! NAT REV entry at ingress to connection opener: SNAT.", "an answer from a backend, to be given the service's address"),
            ("Hit! NAT REV entry but not connection opener: ESTABLISHED.", "towards the backend"),
            ("Miss for TCP SYN, NEW flow.", "a new flow"),
            ("Miss.", "no entry"),
            ("Miss when looking for secondary entry.", "half of a NAT pair is missing"),
            ("TCP SYN recycles entry, NEW flow.", "a new flow with the ports of an old one"),
            ("result: NEW.", "a new flow"),
            ("tun_ip:{ip:ip}", "the node at the other end of the tunnel"),
            ("fwd tun_ip:{ip:ip}", "the node at the other end of the tunnel"),
            ("Updating ifindex from {old:d} to {new:d}", "the flow came by another interface, and may"),
            ("First response packet? ifindex={ifindex:d}", "the interface of the answer is remembered"),
            ("unrelated icmp", "ICMP that is no error"),
            ("Miss on ICMP related", "an ICMP error about no known flow"),
            ("related lookup from {src:ip}:{sport:d}", "an ICMP error: the flow that it is about"),
            ("related lookup to   {dst:ip}:{dport:d}", "an ICMP error: the flow that it is about"),
            ("Packet from unexpected ingress dev - rpf loose or disabled - reset ifindex", "another interface, tolerated"),
            ("Packet from unexpected ingress dev - rpf loose - reset ifindex", "another interface, tolerated"),
            ("tunnel src changed from {old:ip} to {new:ip}", "the flow now comes through another node"),
        )
    ),
    *(
        Message("conntrack", f"{prefix} Packet not allowed by ingress/egress {word} flags ({{flags:w}}).", "only one side's policy has approved the flow", *releases, cause="only one side's policy has approved the flow")
        for prefix, releases, word in (
            ("CT:", ("v3.25", ""), "approval"),
            ("CT-{proto:d}", ("v3.24", "v3.24"), "approval"),
            ("CT-{proto:d}", ("v3.13", "v3.23"), "whitelist"),
        )
    ),
    *(
        Message("conntrack", f"{prefix} result: INVALID.", "an ICMP error about no known flow", *releases, cause="an ICMP error about no known flow")
        for prefix, releases in (("CT:", ("v3.25", "")), ("CT-{proto:d}", ("v3.13", "v3.24")))
    ),
    *(
        Message("conntrack", f"{prefix} CT RPF failed {text}", "a known flow by another interface", *releases, cause="an established flow came by another interface (reverse path)")
        for prefix, releases in (("CT:", ("v3.25", "")), ("CT-{proto:d}", ("v3.13", "v3.24")))
        for text in ("ifindex {ifindex:d} != {expected:d}", "invalidating ifindex")
    ),
    Message("conntrack", "CT: result: 0x{result:x}", "low byte: outcome; then flags (0x100 related, 0x200 reverse path failed, 0x400 tunnel changed)", "v3.21"),
    Message("conntrack", "CT-{proto:d} result: {result:d}", "the outcome's number, which v3.18 renumbered", until="v3.20"),
    Message("conntrack", "CT-{proto:d} result: 0x{result:x}", "low byte: outcome; then flags", "v3.21", "v3.24"),
    Message("conntrack", "CT: result.flags 0x{flags:x}", "flags of the outcome", "v3.32"),
    Message("conntrack", "conntrack entry flags 0x{flags:x}", "flags of the entry", "v3.18"),
    Message("conntrack", "CT: result: related", "an ICMP error about a known flow", "v3.25"),
    Message("conntrack", "CT: RST seen, marking CT entry.", "the connection was reset", "v3.25"),
    Message("conntrack", "CT: Hit! UNKNOWN entry type.", "an entry of another release", "v3.25"),
    Message("conntrack", "CT: Failed to parse ICMP error packet.", "an ICMP error that quotes too little", "v3.25"),
    Message("conntrack", "CT-{proto:d} RST seen, marking CT entry.", "the connection was reset", until="v3.24"),
    Message("conntrack", "CT-{proto:d} RPF expected {expected:d} to equal {ifindex:d}", "a known flow by another interface: left to the host's stack", until="v3.22"),
    Message("conntrack", "CT-TCP delete from {src:ip}:{sport:d}", "an entry is deleted", until="v3.24"),
    Message("conntrack", "CT-TCP delete to   {dst:ip}:{dport:d}", "an entry is deleted", until="v3.24"),
    Message("conntrack", "CT-TCP delete result: {rc:d}", "an entry is deleted, 0 is good", until="v3.24"),
    Message("conntrack", "CT-ICMP: failed to get inner IP", "an ICMP error that quotes too little", until="v3.17"),
    Message("conntrack", "CT-{proto:d} result: related", "an ICMP error about a known flow", until="v3.24"),
    Message("conntrack", "CT-{proto:d} Hit! UNKNOWN entry type.", "an entry of another release", until="v3.24"),
    Message("conntrack", "CT-{proto:d} Failed to parse ICMP error packet.", "an ICMP error that quotes too little", until="v3.24"),
    Message("conntrack", "CT-ICMP: proto {proto:d}", "protocol of the packet in an ICMP error"),
    Message("conntrack", "CT-ICMP: type {type:d} not an error", "ICMP that is no error: a flow of its own", "v3.18"),
    Message("conntrack", "BPF CT related miss for mid-flow TCP", "an ICMP error about a flow without entry: Linux decides", "v3.20"),
    Message("conntrack", "BPF CT related miss but have Linux CT entry: established", "an ICMP error about a flow that Linux knows", "v3.20"),
    Message("conntrack", "BPF CT Miss but have Linux CT entry: established", "Linux knows the connection", "v3.18"),
    Message("conntrack", "BPF CT Miss but Linux CT entry not signalled", "Linux did not mark the packet as of a known connection", "v3.18"),
    Message("conntrack", "CT mid-flow miss to HEP with no Linux conntrack entry: continue but suppressing CT state creation.", "policy will deny it, if there is any", "v3.20"),
    Message("conntrack", "CT mid-flow miss to HEP with no Linux conntrack entry: continue but suppressing CT state creation", "policy will deny it, if there is any", "v3.32"),
    Message("conntrack", "CT mid-flow miss; possible Maglev failover packet, will perform a NAT lookup", "not a SYN, and no entry: it may come from a node that failed", "v3.32"),
    Message("conntrack", "CT mid-flow miss and not a Maglev failover. Fall through to iptables", "Linux conntrack decides", "v3.32"),
    Message("conntrack", "CT mid-flow miss away from host with no Linux conntrack entry, allow.", "not a SYN, and no entry: host interfaces have no policy", "v3.18", "v3.19"),
    Message("conntrack", "CT mid-flow miss away from host with no Linux conntrack entry, drop.", "not a SYN, no entry, and away from the host", "v3.18", cause="no conntrack entry for a packet in mid-flow"),
    Message("conntrack", "should route via bpfnatout", "a service from the host: by bpfout.cali", "v3.24"),
    Message("conntrack", "ICMP related: outer IP SNAT to {ip:ip}", "the ICMP error in the service's name", "v3.25"),
    Message("conntrack", "ICMP related: outer IP DNAT to {ip:ip}", "the ICMP error to the backend", "v3.25"),
    Message("conntrack", "ICMP related returned from NAT tunnel", "an ICMP error from the backend's node", "v3.25"),
    Message("conntrack", "Returning related ICMP from workload to tunnel", "an ICMP error to the entry node"),
    Message("conntrack", "Returning related ICMP from host to tunnel", "an ICMP error to the entry node"),
    Message("conntrack", "Entering calico_tc_host_ct_conflict_entrypoint", "a connection of the host has the same ports", "v3.24"),
    Message("conntrack", "BPF CT Miss for mid-flow TCP", "not a SYN, and no entry", "v3.20"),
    Message("conntrack", "CT mid-flow miss; fall through to iptables", "Linux conntrack decides", "v3.18"),
    Message("conntrack", "CT mid-flow miss; fall through to iptables.", "Linux conntrack decides", "v3.18", "v3.24"),
    Message("conntrack", "CT mid-flow miss away from host with no Linux conntrack entry, will drop{rest:t}", "not a SYN, no entry, and away from the host", "v3.18", cause="no conntrack entry for a packet in mid-flow"),
    Message("conntrack", "Egress HEP should drop packet with no CT state", "in mid-flow out of an interface with policy", "v3.18", cause="no conntrack entry for a packet in mid-flow"),
    Message("conntrack", "Traffic is towards host namespace but not conntracked, falling through to iptables", "Linux conntrack decides", "v3.18"),
    Message("conntrack", "Allowing local host traffic without CT", "the table is full, and the host's own traffic passes", "v3.24"),
    Message("conntrack", "CT: DNAT to {ip:ip}:{port:d}", "the destination becomes the backend"),
    Message("conntrack", "CT: SNAT from {ip:ip}:{port:d}", "the source becomes the service"),
    Message("conntrack", "CT says encap to node {ip:ip}", "to the backend's node, by the entry"),
    Message("conntrack", "Packet returned from tunnel {ip:ip}", "an answer from the backend's node"),
    Message("conntrack", "returned from NAT tunnel", "an answer from the backend's node, on to the client"),
    Message("conntrack", "DSR enabled, skipping SNAT + encap", "the answer goes straight to the client"),
    # nat
    Message("nat", "NAT: 1st level lookup addr={ip:ip} port={port:d} protocol={proto:d}.", "is there such a service", until="v3.24"),
    Message("nat", "NAT: 1st level lookup addr={ip:ip} port={port:d} {proto:w}", "is there such a service", "v3.25"),
    Message("nat", "NAT: Miss.", "no service has that address and port"),
    Message("nat", "NAT: route miss", "the destination is in no route: no NodePort"),
    Message("nat", "NAT: route dest not a host", "the destination is no node: no NodePort"),
    Message("nat", "NAT: nodeport hit", "a NodePort of any node"),
    Message("nat", "NAT: nodeport miss", "no NodePort either"),
    Message("nat", "NAT: ignore rt lookup miss from tunnel, assume nodeport", "out of the tunnel: it must be a NodePort"),
    Message("nat", "NAT: 1st level hit; id={id:d}", "the service"),
    Message("nat", "NAT: 1st level hit; id={id:d} ordinal={ordinal:d}", "the service and the backend's number"),
    Message("nat", "local_traffic {local:d}", "only backends on this node may be used", "v3.22"),
    Message("nat", "count {count:d} flags 0x{flags:x}", "backends that may be used, flags of the service", "v3.22"),
    Message("nat", "NAT: no backend", "the service has no backend that may be used: ICMP port unreachable, or EPERM at connect"),
    Message("nat", "NAT: backend miss", "the backend is missing in the map"),
    Message("nat", "NAT: backend selected {ip:ip}:{port:d}", "the backend"),
    Message("nat", "NAT: backend affinity {seconds:d} seconds", "a client keeps its backend"),
    Message("nat", "NAT: using affinity backend {ip:ip}:{port:d}", "the client's backend of before"),
    Message("nat", "NAT: affinity expired for {ip:ip}:{port:d}", "the client's backend is chosen anew"),
    Message("nat", "NAT: affinity invalid - update it", "the client's backend of before is gone"),
    Message("nat", "NAT: affinity invalid, new lookup for {ip:ip}", "the client's backend is chosen anew", until="v3.21"),
    Message("nat", "no previous affinity for {ip:ip}:{port:d}", "the client has no backend yet"),
    Message("nat", "NAT: no previous affinity for {ip:ip}:{port:d}", "the client has no backend yet"),
    Message("nat", "NAT: updating affinity for client {ip:ip}", "the client's backend is remembered"),
    Message("nat", "NAT: failed to update affinity table: {error:d}", "the map is full"),
    Message("nat", "local_traffic {local:d} count {count:d} flags 0x{flags:x}", "only backends on this node may be used", "v3.22", "v3.26"),
    Message("nat", "Host accesses nodeport backend {ip:ip}:{port:d}", "a NodePort from the host", "v3.25"),
    Message("nat", "Host accesses nodeport state->flags 0x{flags:x}", "a NodePort from the host", "v3.25"),
    Message("nat", "NP redir on HEP - skip policy", "a NodePort from the host, to a pod here", "v3.25"),
    Message("nat", "NP redir remote on LO", "a NodePort from the host, to a pod elsewhere", "v3.25"),
    Message("nat", "NP redir remote on HEP to tunnel", "a NodePort from the host, to a pod elsewhere", "v3.25"),
    Message("nat", "NP local WL {ip:ip}:{port:d} on HEP", "a NodePort from the host, to a pod here", "v3.25"),
    Message("nat", "NP remote WL {ip:ip}:{port:d} on LO or main HEP", "a NodePort from the host, to a pod elsewhere", "v3.25"),
    Message("nat", "remote wl {ip:ip} tunneled via {tunnel:ip}", "the backend is behind the overlay tunnel", "v3.25"),
    Message("nat", "remote wl {ip:ip} tunneled", "the backend is behind the overlay tunnel", "v3.22", "v3.24"),
    Message("nat", "Packet is from an unauthorised source: DROP", "loadBalancerSourceRanges does not name the client", cause=NOT_IN_SOURCE_RANGES),
    Message("nat", "NAT excluded", "bpfExcludeCIDRsFromNAT names the service", "v3.28"),
    # rpf
    Message("rpf", "Host RPF check disabled", "bpfEnforceRPF is Disabled", "v3.23"),
    Message("rpf", "Host RPF check src={src:ip} skb strict if {ifindex:d}", "the way back must be by this interface", "v3.23"),
    Message("rpf", "Host RPF check src={src:ip} skb loose if {ifindex:d}", "there must be a way back", "v3.25"),
    Message("rpf", "Host RPF check src={src:ip} skb iface={ifindex:d}", "the interface of the packet", "v3.23"),
    Message("rpf", "Host RPF check src={src:ip} skb iface={ifindex:d} fib rc {rc:d}", "FIB result", "v3.23", "v3.24"),
    Message("rpf", "Host RPF check src={src:ip} skb iface={ifindex:d} result {result:d}", "0 fails, 1 passes", "v3.23", "v3.24"),
    Message("rpf", "Host RPF check rc {rc:d} result {result:d}", "FIB result; 0 fails, 1 strict, 2 loose, 3 disabled", "v3.23"),
    Message("rpf", "Workload RPF check src={src:ip} rpf iface={ifindex:d}.", "the pod that owns the source", "v3.23"),
    Message("rpf", "Workload RPF check src={src:ip} skb iface={ifindex:d}.", "the interface of the packet"),
    Message("rpf", "Workload RPF fail: missing route.", "the source is in no route", cause=_RPF),
    Message("rpf", "Workload RPF fail: not a local workload.", "the source belongs elsewhere", cause=_RPF),
    Message("rpf", "Workload RPF fail skb iface ({ifindex:d}) != route iface ({expected:d})", "the source is another pod's", cause=_RPF),
    Message("rpf", "Workload RPF bypass: allowing spoofed source IP", "allowed by the pod's list of source prefixes", "v3.32"),
    Message("rpf", "Host RPF check skb strict if {ifindex:d}", "the way back must be by this interface (IPv6)", "v3.25"),
    Message("rpf", "Host RPF check skb loose if {ifindex:d}", "there must be a way back (IPv6)", "v3.25"),
    Message("rpf", "Host RPF check skb iface={ifindex:d}", "the interface of the packet (IPv6)", "v3.25"),
    # policy
    Message("policy", "About to jump to policy program.", "policy is next", "v3.18"),
    Message("policy", "About to jump to policy program; lack of further logs means policy dropped the packet...", "policy is next; nothing after this line is a denial", until="v3.17"),
    Message("policy", "About to jump to policy program at {index:d}", "XDP: policy is next", "v3.27"),
    Message("policy", "policy allow prog at {index:d}", "where policy goes on when it allows", "v3.27"),
    Message("policy", "policy deny prog at {index:d}", "where policy goes on when it denies", "v3.27"),
    Message("policy", "jump to policy prog at {index:d}", "the policy program's slot", "v3.27"),
    Message("policy", "HEP with no policy, allow.", "no host endpoint: the usual case"),
    Message("policy", "WEP with no policy, deny.", "the pod's policy program is not there", cause="no policy program is loaded for the workload"),
    Message("policy", "Entering normal policy tail call", "policy begins", until="v3.17"),
    Message("policy", "Entering normal policy program", "policy begins", "v3.24", "v3.24"),
    Message("policy", "Rule {number:d} ", "a rule is tried", until="v3.17"),
    Message("policy", "  MATCH -> {action:w}", "a rule matches", until="v3.17"),
    Message("policy", "Allowed by policy: ACCEPT", "policy allows", "v3.18"),
    Message("policy", "Implicitly denied by policy: DROP", "no rule matched", "v3.18", cause="denied by policy"),
    Message("policy", "Packet is from the host: ACCEPT", "the node may always talk to its pods"),
    Message("policy", "Source is in NAT-outgoing pool but dest is not, need to SNAT.", "natOutgoing"),
    Message("policy", "Source {ip:ip} not in IP pool", "another CNI gave the address", "v3.20"),
    Message("policy", "Outside cluster dest {ip:ip}", "left to the host's stack", "v3.20"),
    Message("policy", "Socket cookie: {cookie:x}", "a socket of this host sent it", "v3.18"),
    Message("policy", "Got cali_ct_nats entry; flow was NATted by CTLB.", "policy sees the service that the socket was connected to", "v3.18"),
    Message("policy", "Got cali_v4_ct_nats entry; flow was NATted by CTLB.", "policy sees the service that the socket was connected to", "v3.18", "v3.26"),
    Message("policy", "Source IP is local host.", "from this node"),
    Message("policy", "Post-NAT dest IP is local host.", "to this node"),
    Message("policy", "Outbound failsafe port: {port:d}. Skip policy.", "failsafeOutboundHostPorts"),
    Message("policy", "Inbound failsafe port: {port:d}. Skip policy.", "failsafeInboundHostPorts"),
    Message("policy", "MASQ to self - using dest as source for policy.", "a pod reaches itself through a service", "v3.27"),
    Message("policy", "Accepted MASQ to self - restoring source for conntrack.", "a pod reaches itself through a service", "v3.27"),
    Message("policy", "Allowed by policy, skipping{rest:t}", "policy allows"),
    Message("policy", "Allowed by normal policy: ACCEPT", "policy allows", until="v3.17"),
    Message("policy", "Entering calico_tc_skb_drop", "policy denied", "v3.24"),
    Message("policy", "Entering calico_tc_skb_drop - DENY", "policy denied; the state of the packet follows, and no result", "v3.23", "v3.24", "denied by policy"),
    Message("policy", "DENY due to policy", "policy denied; the last line", "v3.24", cause="denied by policy"),
    Message("policy", "Allowing WG {src:ip} <-> {dst:ip} despite blocked by policy - known hosts.", "WireGuard between nodes passes a policy that denies it", "v3.27"),
    Message("policy", "Failed to jump to allow program.", "the slot is empty", "v3.27", cause=CHAIN),
    Message("policy", "Failed to jump to allow program - deny.", "the slot is empty", "v3.31", cause=CHAIN),
    Message("policy", "Flow log event generated for {action:t}", "Felix is told for its flow logs", _NEW),
    Message("policy", "Denied by policy: DROP", "policy denied", "v3.18", cause="denied by policy"),
    Message("policy", "Denied by normal policy: DROP", "policy denied", until="v3.17", cause="denied by policy"),
    Message("policy", "Ooops, we already passed one such a check!!!", "a bug", until="v3.24", cause="a bug in Calico"),
    Message("policy", "Implicitly denied by {rest:t}", "no rule matched", until="v3.23", cause="denied by policy"),
    Message("policy", "Workload to host traffic blocked by DefaultEndpointToHostAction: DROP", "a pod to its own node", cause="defaultEndpointToHostAction is Drop"),
    Message("policy", "Tail call to policy program failed: DROP", "the slot is empty", cause=CHAIN),
    Message("policy", "Tail call to normal policy program failed: DROP", "the slot is empty", until="v3.24", cause=CHAIN),
    Message("policy", "Tail call to post-policy program failed: DROP", "the slot is empty", cause=CHAIN),
    # accepted
    Message("accepted", "Entering calico_tc_skb_accepted_entrypoint", "after policy"),
    Message("accepted", "Entering calico_tc_skb_accepted_entrypoint fib {fib:d}", "after policy", _NEW),
    Message("accepted", "Entering calico_tc_skb_accepted", "after policy"),
    Message("accepted", "Entering calico_tc_skb_new_flow", "a new flow", "v3.25"),
    Message("accepted", "Entering {program:t}", "another program of the chain"),
    Message("accepted", "marking {mark:w}", "the mark it leaves with"),
    Message("accepted", "jump to idx {index:d} prog at {slot:d}", "the next program of the chain", "v3.25"),
    Message("accepted", "jump failed", "the slot is empty", cause=CHAIN),
    Message("accepted", "jump failed - deny", "the slot is empty", "v3.31", cause=CHAIN),
    Message("accepted", "jump to new flow failed", "the slot is empty", cause=CHAIN),
    Message("accepted", "jump to icmp inner nat failed", "the slot is empty", cause=CHAIN),
    Message("accepted", "src={src:ip} dst={dst:ip}", "addresses before NAT"),
    Message("accepted", "pre_nat={ip:ip}:{port:d}", "destination before NAT"),
    Message("accepted", "post_nat={ip:ip}:{port:d}", "destination after NAT, 0 for none"),
    Message("accepted", "tun_ip={ip:ip}", "the node at the other end of the tunnel, 0 for none"),
    Message("accepted", "pol_rc={rc:d}", "policy: 0 no match, 1 allow, 2 deny"),
    Message("accepted", "proto={proto:d}", "protocol number"),
    Message("accepted", "sport={port:d}", "source port"),
    Message("accepted", "dport={port:d}", "destination port", "v3.18"),
    Message("accepted", "flags={flags:x}", "flags of the packet's state"),
    Message("accepted", "flags=0x{flags:x}", "flags of the packet's state"),
    Message("accepted", "ct_rc={rc:d}", "outcome of the conntrack lookup"),
    Message("accepted", "ct_related={related:d}", "an ICMP error about a known flow"),
    Message("accepted", "mark=0x{mark:x}", "the packet's mark", "v3.18"),
    Message("accepted", "ip->ttl {ttl:d}", "time to live"),
    Message("accepted", "ip->hop_limit {ttl:d}", "time to live of IPv6", "v3.25"),
    Message("accepted", "We should never fall through here", "a bug", cause="a bug in Calico"),
    Message("accepted", "state->tun_ip = {ip:ip}", "the node at the other end of the tunnel", "v3.26"),
    Message("accepted", "CALI_CT_FLAG_NP_NO_DSR", "bpfDSROptoutCIDRs names the client: answers by the tunnel", "v3.26"),
    Message("accepted", "marking CALI_SKB_MARK_BYPASS", "both sides have approved the flow"),
    Message("accepted", "marking CALI_SKB_MARK_MASQ", "the host's stack must masquerade"),
    Message("accepted", "marking CALI_SKB_MARK_FROM_NAT_IFACE_OUT", "it passed bpfout.cali", "v3.24"),
    Message("accepted", "Related traffic, marking with CALI_SKB_MARK_RELATED_RESOLVED", "an ICMP error that is translated already", "v3.29"),
    Message("accepted", "Setting mark to 0x{mark:x}", "the mark it leaves with", "v3.25"),
    Message("accepted", "New loopback SNAT", "a pod reaches itself through a service"),
    Message("accepted", "Loopback SNAT", "a pod reaches itself through a service"),
    Message("accepted", "forward_or_drop fib {fib:d}", "the way out is next", _NEW),
    Message("accepted", "forward_or_drop mark 0x{mark:x}", "the mark it leaves with", _NEW),
    Message("accepted", "forward_or_drop state flags 0x{flags:x}", "flags of the packet's state", _NEW),
    # entry
    Message("entry", "CT-ALL packet mark is: 0x{mark:x}", "the mark it came with"),
    Message("entry", "CT-ALL Asked to create entry but packet is marked as from another endpoint, doing lookup", "another program made the entry"),
    Message("entry", "CT-ALL Creating tracking entry type {type:d} at {time:d}.", "a new entry: 0 plain, 2 NAT"),
    Message("entry", "CT-ALL tracking entry flags 0x{flags:x}", "its flags", "v3.18"),
    Message("entry", "CT-ALL SNAT orig {ip:ip}:{port:d}", "the client", "v3.22"),
    Message("entry", "CT-ALL nat tunneled to {ip:ip}", "to the backend's node"),
    Message("entry", "CT-ALL nat tunneled from {ip:ip}", "from the entry node"),
    Message("entry", "CT-ALL approved source side - from {what:t}", "the source's policy approved", "v3.24"),
    Message("entry", "CT-ALL approved dest side - from WEP", "the host may answer without policy", "v3.31"),
    Message("entry", "CT-ALL approved dest side - to {what:t}", "the destination's policy approved", "v3.24"),
    Message("entry", "CT-ALL Whitelisted source side - from {what:t}", "the source's policy approved", until="v3.23"),
    Message("entry", "CT-ALL Whitelisted dest side - to {what:t}", "the destination's policy approved", until="v3.23"),
    Message("entry", "CT-ALL update src_to_dst B->A", "the other direction of an entry"),
    Message("entry", "CT-ALL update src_to_dst A->B", "the first direction of an entry"),
    Message("entry", "CT-{proto:d} Creating FWD entry at {time:d}.", "the entry that leads from the service to the flow"),
    Message("entry", "FWD {src:ip} -> {dst:ip}", "client and service"),
    Message("entry", "NEW src_to_dst->ifindex {ifindex:d}", "the interface it came by"),
    Message("entry", "REV src_to_dst->ifindex {ifindex:d}", "the interface it came by"),
    Message("entry", "CT_NEW marked with FLAG_EXT_LOCAL", "from outside to a pod of this node", "v3.19"),
    Message("entry", "To host marked with FLAG_EXT_LOCAL", "from outside to a pod of this node", "v3.19"),
    Message("entry", "Source collision for {ip:ip}:{port:d}", "the same client port through another node", "v3.21"),
    Message("entry", "CT-ALL nat tunnel IP not a host {ip:ip}", "the tunnel's other end is no known node", cause="the tunnel's other end is no known node"),
    Message("entry", "CT-ALL approved both due to host source port conflict resolution.", "both sides' policy approved", "v3.24"),
    Message("entry", "CT-ALL Whitelisted both due to host source port conflict resolution.", "both sides' policy approved", "v3.22", "v3.23"),
    Message("entry", "FWD for psnat host conflict", "another source port for the host's connection", "v3.24"),
    Message("entry", "calico_ct_v4_create_tracking err {error:d}", "the table is full, or clashes", "v3.24", cause=NO_ROOM),
    Message("entry", "New sport {port:d}", "another source port in place of it", "v3.21"),
    Message("entry", "Source collision unresolved {ip:ip}:{port:d}", "no free source port in bpfPSNATPorts", "v3.21", cause="no free source port to resolve a collision"),
    Message("entry", "Creating NAT conntrack failed with {error:d}", "the table is full, or clashes", cause=NO_ROOM),
    Message("entry", "Creating NAT conntrack failed", "the table is full, or clashes", until="v3.17", cause=NO_ROOM),
    Message("entry", "Creating normal conntrack failed{rest:t}", "the table is full, or clashes", cause=NO_ROOM),
    Message("entry", "Host source SNAT conflict", "a connection of the host has the same ports", "v3.24"),
    Message("entry", "Failed to call conflict resolution.", "the slot is empty", "v3.24", cause=CHAIN),
    Message("entry", "Unexpected CT result {result:d} after host source port collision DENY.", "a bug or an edge", "v3.24", cause="unexpected conntrack result"),
    # rewrite
    Message("rewrite", "Fixing TCP source port from {old:d} to {new:d}", "the port of the real flow", "v3.18"),
    Message("rewrite", "Fixing TCP dest port from {old:d} to {new:d}", "the port of the real flow", "v3.18"),
    Message("rewrite", "Fixing UDP source port from {old:d} to {new:d}", "the port of the real flow", "v3.18"),
    Message("rewrite", "Fixing UDP dest port from {old:d} to {new:d}", "the port of the real flow", "v3.18"),
    Message("rewrite", "DNAT L3 csum at {l3:d} L4 csum at {l4:d}", "where the checksums are", "v3.25"),
    Message("rewrite", "SNAT L3 csum at {l3:d} L4 csum at {l4:d}", "where the checksums are", "v3.25"),
    Message("rewrite", "L4 checksum update (csum is at {at:d}) IP from {old:ip} to {new:ip}", "an address changes", until="v3.24"),
    Message("rewrite", "L4 checksum update (csum is at {at:d}) port from {old:d} to {new:d}", "a port changes", until="v3.24"),
    *(
        Message("rewrite", f"L4 checksum update (csum is at {{at:d}}) {what} from {{old:{kind}}} to {{new:{kind}}}", meaning, "v3.21", "v3.26")
        for what, kind, meaning in (
            ("src IP", "ip", "the source changes"),
            ("dst IP", "ip", "the destination changes"),
            ("sport", "d", "the source port changes"),
            ("dport", "d", "the destination port changes"),
        )
    ),
    Message("rewrite", "L4 checksum update src IP from {old:ip} to {new:ip}", "the source changes", "v3.25"),
    Message("rewrite", "L4 checksum update dst IP from {old:ip} to {new:ip}", "the destination changes", "v3.25"),
    Message("rewrite", "L4 checksum update sport from {old:d} to {new:d}", "the source port changes", "v3.25"),
    Message("rewrite", "L4 checksum update dport from {old:d} to {new:d}", "the destination port changes", "v3.25"),
    Message("rewrite", "bpf_l4_csum_diff(IP): 0x{sum:x}", "result of a helper", "v3.25"),
    Message("rewrite", "bpf_l4_csum_replace(IP): {rc:d}", "result of a helper, 0 is good"),
    Message("rewrite", "bpf_l4_csum_replace(port): {rc:d}", "result of a helper, 0 is good", until="v3.24"),
    Message("rewrite", "bpf_l4_csum_replace(sport): {rc:d}", "result of a helper, 0 is good", "v3.25"),
    Message("rewrite", "bpf_l4_csum_replace(dport): {rc:d}", "result of a helper, 0 is good", "v3.25"),
    Message("rewrite", "rt found for {ip:ip} local {local:d}", "the backend's route", "v3.18"),
    Message("rewrite", "missing rt found for {ip:ip}", "the backend is in no route", cause="the backend is not in Calico's routes map"),
    Message("rewrite", "Too short for IP write back", "fewer bytes than the headers need", cause="the packet is too short"),
    Message("rewrite", "Too short for L4 ports write back", "fewer bytes than the headers need", cause="the packet is too short"),
    Message("rewrite", "Entering calico_tc_skb_icmp_inner_nat", "the packet in an ICMP error is translated too", "v3.25"),
    Message("rewrite", "ICMP: unexpected unrelated", "an ICMP error about no known flow", "v3.25", cause="an ICMP error about no known flow"),
    Message("rewrite", "ICMP inner IP header has options; unsupported", "the packet in an ICMP error has IPv4 options", until="v3.26", cause="IP options are not supported"),
    Message("rewrite", "ICMP: Drop malformed or unsupported packet", "headers that make no sense", "v3.25", cause="malformed or unsupported packet"),
    Message("rewrite", "Non ipv4 packet on icmp path! DROP!", "headers that make no sense", "v3.25", cause="malformed or unsupported packet"),
    Message("rewrite", "No route for post DNAT dest {ip:ip}", "left to the host's stack"),
    Message("rewrite", "Packet hit a black hole route: DROP", "a service address that no service uses", "v3.29", cause="the destination is a service address that no service uses"),
    Message("rewrite", "Packet hit a black hole route: REJECT", "a service address that no service uses", "v3.29", cause="the destination is a service address that no service uses"),
    # encap
    Message("encap", "marking CALI_SKB_MARK_BYPASS_FWD", "programs on the way out need not look again"),
    Message("encap", "vxlan encap {src:x} : {dst:x}", "put into VXLAN, always in hexadecimal"),
    Message("encap", "vxlan return {return:d} ifindex_fwd {ifindex:d}", "whether it is an answer, and the way out"),
    Message("encap", "VXLAN encap needed but host IP unknown; dropping", "the Node resource has no address", "v3.32", cause="the node's own address is unknown to Felix"),
    Message("encap", "VXLAN encap: too short{rest:t}", "fewer bytes than the headers need", cause="the packet is too short"),
    Message("encap", "SKB too long (len={len:d}) vs limit={limit:d}", "it does not fit into the tunnel"),
    Message("encap", "Too short VXLAN encap", "fewer bytes than the headers need", cause="the packet is too short"),
    Message("encap", "Request packet with DNF set is too big", "it does not fit into the tunnel: ICMP fragmentation needed"),
    Message("encap", "bpf_skb_set_tunnel_key {rc:d} nh {ip:ip}", "the overlay tunnel is told the node", "v3.31"),
    Message("encap", "ARP lookup failed for {ip:ip} dev {ifindex:d}", "no packet came from that node yet"),
    Message("encap", "ARP lookup failed for {ip:ip} dev {ifindex:d} at HEP", "no packet came from that node yet"),
    # fib
    Message("fib", "FIB family={family:d}", "what the kernel's routing is asked with"),
    Message("fib", "FIB tot_len={len:d}", "what the kernel's routing is asked with", until=_OLD),
    Message("fib", "FIB ifindex={ifindex:d}", "what the kernel's routing is asked with"),
    Message("fib", "FIB l4_protocol={proto:d}", "what the kernel's routing is asked with"),
    Message("fib", "FIB sport={port:d}", "what the kernel's routing is asked with"),
    Message("fib", "FIB dport={port:d}", "what the kernel's routing is asked with"),
    Message("fib", "FIB ipv4_src={ip:ip}", "what the kernel's routing is asked with"),
    Message("fib", "FIB ipv4_dst={ip:ip}", "what the kernel's routing is asked with"),
    Message("fib", "FIB ipv6_src={ip:ip}", "what the kernel's routing is asked with", "v3.25"),
    Message("fib", "FIB ipv6_dst={ip:ip}", "what the kernel's routing is asked with", "v3.25"),
    Message("fib", "Traffic is towards the host namespace, doing Linux FIB lookup", "the kernel's routing decides"),
    Message("fib", "Traffic is towards host namespace, marking with {mark:x}.", "left to the host's stack", until="v3.17"),
    Message("fib", "Traffic is towards host namespace, marking with 0x{mark:x}.", "left to the host's stack", "v3.18"),
    Message("fib", "Disabling FIB lookup due to SKIP_FIB flag", "the flow must pass the host's stack", _NEW),
    Message("fib", "FIB lookup succeeded", "a way out", until="v3.24"),
    Message("fib", "FIB lookup succeeded - with neigh", "a way out", "v3.18", "v3.32"),
    Message("fib", "FIB lookup succeeded - not neigh - gw {ip:ip}", "a way out, through a gateway", "v3.18", _OLD),
    Message("fib", "FIB lookup succeeded - no neigh - gw {ip:ip}", "a way out, the neighbour not yet known", "v3.18", _OLD),
    Message("fib", "FIB lookup succeeded - gw {ip:ip}", "a way out", _NEW),
    Message("fib", "FIB lookup failed (FIB problem): {rc:d}.", "BPF_FIB_LKUP_RET_*: left to the host's stack"),
    Message("fib", "FIB lookup failed (bad input): {rc:d}.", "left to the host's stack"),
    Message("fib", "Got Linux FIB hit, redirecting to iface {ifindex:d}.", "straight to that interface"),
    Message("fib", "Got Linux FIB hit, redirecting to iface {ifindex:d} failed.", "left to the host's stack", until=_OLD),
    Message("fib", "Got Linux FIB hit, redirecting to iface {ifindex:d} succeeded.", "straight to that interface", until=_OLD),
    Message("fib", "Redirect directly to interface ({ifindex:d}) succeeded.", "straight to that interface"),
    Message("fib", "Redirect directly to interface ({ifindex:d}) failed.", "left to the host's stack"),
    Message("fib", "Redirect to peer interface ({ifindex:d}) succeeded.", "straight into the pod", "v3.29"),
    Message("fib", "Redirect to workload dev {ifindex:d} without fib lookup", "straight to the pod's interface", _NEW),
    Message("fib", "Redirect to dev {ifindex:d} without fib lookup", "straight to that interface", _NEW),
    Message("fib", "Redirect to the same interface ({ifindex:d}) succeeded.", "back where it came from"),
    Message("fib", "Redirect to the same interface ({ifindex:d}) failed.", "back where it came from", cause="the packet could not be sent back by its interface"),
    Message("fib", "No route for {ip:ip} to forward from WEP", "the kernel's routing decides", _NEW),
    Message("fib", "Redirect directly to interface bpfnatin succeeded.", "a service from the host, by bpfin.cali", "v3.25"),
    Message("fib", "No route for {ip:ip} at tunnel device", "the overlay tunnel has no node for it", "v3.31", cause="no route for the destination at the tunnel device"),
    Message("fib", "Not a tunnel route for {ip:ip} at tunnel device", "left to the tunnel device", "v3.31"),
    Message("fib", "ifindex_fwd is CT_INVALID_IFINDEX, doing FIB lookup", "the entry does not say the way out", "v3.30"),
    Message("fib", "mtu_result {mtu:d} dev {ifindex:d}", "what the kernel's routing says about the MTU"),
    Message("fib", "FIB mark=0x{mark:x}", "what the kernel's routing is asked with", "v3.27"),
    Message("fib", "bpf_skb_change_head failed {error:d}.", "no room for an Ethernet header", "v3.27"),
    Message("fib", "FIB lookup succeeded - not neigh{rest:t}", "a way out", "v3.18", "v3.29"),
    Message("fib", "FIB not approved - connection to unknown ep {ifindex:d} not confirmed.", "the interface is not in the ifstate map", "v3.24", cause="the interface the packet should leave by is not in Calico's ifstate map"),
    Message("fib", "FIB not approved - connection to unready ep {name:w} (ifindex {ifindex:d}) not confirmed.", "the pod's programs are not attached yet", "v3.24", cause="the pod's programs are not attached yet"),
    Message("fib", "FIB not approved - connection to unready ep {name:w} (flags 0x{flags:x}) not confirmed.", "the pod's programs are not attached yet", "v3.24", cause="the pod's programs are not attached yet"),
    Message("fib", "FIB not approved - connection to unready 0x{flags:x} ep {name:w} ({ifindex:d}) not confirmed.", "the pod's programs are not attached yet", "v3.25", cause="the pod's programs are not attached yet"),
    Message("fib", "FIB not approved - connection to unready ep {name:w} ({ifindex:d}) not confirmed.", "the pod's programs are not attached yet", "v3.24", cause="the pod's programs are not attached yet"),
    Message("fib", "Allow packets to host interface not managed by calico (ifindex {ifindex:d}).", "an interface that Felix leaves alone", "v3.30"),
    Message("fib", "No FIB or failed, redirect to NATIF.", "a service from the host, by bpfin.cali", "v3.25"),
    Message("fib", "Redirect directly to bpfnatin failed.", "bpfin.cali is missing or down", "v3.25", cause="the path through bpfin.cali is broken"),
    # icmp
    Message("icmp", "Entering calico_tc_skb_send_icmp_replies", "Calico answers with an ICMP error"),
    Message("icmp", "ICMP type {type:d} and code {code:d}", "the error", "v3.18"),
    Message("icmp", "ICMP v{version:d} reply: from orig pre DNAT {ip:ip}", "in the service's name", "v3.25"),
    Message("icmp", "ICMP v{version:d} reply creation succeeded", "the error is on its way", "v3.18"),
    Message("icmp", "ICMP: checksum 0x{sum:x} len {len:d}", "of the error", "v3.18"),
    Message("icmp", "Trimming to {len:d}", "what it quotes"),
    Message("icmp", "Inserting {len:d}", "room for its header"),
    Message("icmp", "Len after insert {len:d}", "room for its header"),
    Message("icmp", "Return ICMP mtu is too big{rest:t}", "the sender is told to send less at once"),
    Message("icmp", "Sending ICMP too big mtu={mtu:d}", "the sender is told to send less at once", until="v3.24"),
    Message("icmp", "ip->ihl: {words:d}", "length of the IPv4 header in words; more than 5 means options", until="v3.26"),
    Message("icmp", "ICMP v{version:d} reply: IP options", "the answer could not be made", until="v3.26", cause="IP options are not supported"),
    Message("icmp", "ICMP v{version:d} reply: too short", "the answer could not be made", cause="the packet is too short"),
    Message("icmp", "ICMP v{version:d} reply: too short getting hdr", "an ICMP error that quotes too little", cause="the packet is too short"),
    Message("icmp", "ICMP v{version:d} reply: too short getting ip hdr w/ options", "an ICMP error that quotes too little", cause="the packet is too short"),
    Message("icmp", "ICMP v{version:d} reply: too short getting l4 hdr w/ options", "an ICMP error that quotes too little", cause="the packet is too short"),
    Message("icmp", "ICMP v{version:d} reply: too short after making room", "the answer could not be made", cause="the packet is too short"),
    Message("icmp", "ICMP v{version:d} reply: early bpf_skb_change_tail (len={len:d}) failed (err={error:d})", "the answer could not be made", cause="the ICMP answer could not be made"),
    Message("icmp", "ICMP v{version:d} reply: failed to make room", "the answer could not be made", cause="the ICMP answer could not be made"),
    Message("icmp", "ICMP v{version:d} reply: set ip csum failed", "the answer could not be made", cause="the ICMP answer could not be made"),
    Message("icmp", "ICMP v{version:d} reply: set icmp csum failed", "the answer could not be made", cause="the ICMP answer could not be made"),
    Message("icmp", "ICMP v{version:d} reply: from orig dst host IP {ip:ip}", "in the node's name"),
    Message("icmp", "ICMP v{version:d} reply: from IP of the intf {ip:ip}", "in the interface's name"),
    Message("icmp", "ICMP v{version:d} reply: from orig pre DNAT IP", "in the service's name"),
    Message("icmp", "icmp v6 reply: packet too short", "the answer could not be made", "v3.25", cause="the packet is too short"),
    Message("icmp", "Sending TCP RST due to CT state", "the backend is gone", "v3.32"),
    Message("icmp", "Entering calico_tc_skb_send_tcp_rst", "Calico answers with a TCP RST", "v3.32"),
    Message("icmp", "TCP reset : too short", "the answer could not be made", "v3.32", cause="the packet is too short"),
    Message("icmp", "tcp reset reply: bpf_skb_change_tail (len={len:d}) failed (err={error:d})", "the answer could not be made", "v3.32", cause="the TCP RST could not be made"),
    Message("icmp", "TCP reset v{version:d} reply: {rest:t}", "the answer could not be made", "v3.32", cause="the TCP RST could not be made"),
    Message("icmp", "ICMP v{version:d} reply: ip_orig.daddr != HOST_IP 0x{ip:x}", "of a build for tests", "v3.25"),
    # fragment
    Message("fragment", "Entering calico_tc_skb_ipv4_frag", "a fragment: it waits until all are there", "v3.31"),
    Message("fragment", "IPv4 fragmentation not supported in this kernel version", "programs without CO-RE do not put fragments together", "v3.31", "v3.32", "the kernel is too old to put fragments together"),
    Message("fragment", "iphdr_offset {offset:d} ihl {ihl:d}", "where the header is", "v3.31"),
    Message("fragment", "IP FRAG: no first fragment{rest:t}", "it overtook the first one, or the kernel is too old", "v3.31", cause="a fragment without its first"),
    Message("fragment", "Missing IP fragment at offset {offset:d}", "not all fragments are there yet", "v3.31"),
    Message("fragment", "IP FRAG:{rest:t}", "a fragment", "v3.31"),
    # limit
    Message("limit", "Drop packet due to QoS packet rate limit.", "annotations qos.projectcalico.org", "v3.31", cause="QoS limit of the pod"),
    Message("limit", "packet rate QoS: {what:t}", "the bucket of the pod's packet rate", "v3.31"),
    Message("limit", "setting dscp to {dscp:d}", "annotations qos.projectcalico.org", "v3.31"),
    Message("limit", "Remote host or outside cluster source {ip:ip}", "no pod's address: DSCP is set where the pod asks for it", "v3.30"),
    Message("limit", "Remote host or outside cluster dest {ip:ip}", "no pod's address: DSCP is set where the pod asks for it", "v3.30"),
    Message("limit", "IP DSCP: set for Mesh", "istioDSCPMark, between pods of Istio's mesh", "v3.32"),
    Message("limit", "IP DSCP: set L3 csum failed", "the checksum could not be changed", "v3.31", cause="wrong checksum"),
    Message("limit", "Egress connection limit exceeded, rejecting with TCP RST", "annotations qos.projectcalico.org", "v3.32", cause="the pod's limit of connections"),
    Message("limit", "Ingress connection limit exceeded, rejecting with TCP RST", "annotations qos.projectcalico.org", "v3.32", cause="the pod's limit of connections"),
    Message("limit", "connlimit: decremented count to {count:d}/{limit:d}", "a connection ended", "v3.32", tagged=False),
    # maglev
    Message("maglev", "Entering calico_tc_maglev", "Maglev chooses the backend", "v3.32"),
    Message("maglev", "Maglev: select backend failed", "the table has no backend", "v3.32", cause="Maglev found no backend"),
    Message("maglev", "Maglev: no backend found for svc {id:d}, idx {index:d}", "the table has no backend", "v3.32", cause="Maglev found no backend"),
    Message("maglev", "Maglev: hashed packet to {hash:d}", "the place in the table", "v3.32"),
    Message("maglev", "Maglev: no backend found for {ip:ip}:{port:d}", "the table has no backend", "v3.32", cause="Maglev found no backend"),
    Message("maglev", "NAT Lookup determined packet to be Maglev-related", "the service is balanced by Maglev", "v3.32"),
    Message("maglev", "Maglev: mid-flow miss, treating as new flow", "a flow of a node that failed goes on here", "v3.32"),
    Message("maglev", "Maglev: About to jump to policy program.", "policy is next", "v3.32"),
    Message("maglev", "Maglev: HEP with no policy, allow.", "no host endpoint: the usual case", "v3.32"),
    Message("maglev", "Maglev: jump to policy failed.", "the slot is empty", "v3.32", cause=CHAIN),
    Message("maglev", "Maglev: No route for post DNAT dest {ip:ip}", "the backend is in no route", "v3.32", cause="the backend is not in Calico's routes map"),
    Message("maglev", "Packet proto: {proto:d}, Ordinal: {ordinal:d}", "the place in the table, where no backend is", "v3.32", cause="Maglev found no backend"),
    Message("maglev", "Failed to jump to maglev program", "the slot is empty", "v3.32", cause=CHAIN),
    # end
    Message("end", "Final result=ALLOW ({code:d}). Program execution time: {ns:d}ns", "up to v3.17 the return code, then the reason", until="v3.32"),
    Message("end", "Final result=ALLOW rc {rc:d}. Program execution time: {ns:d}ns", "return code to the kernel: -1 go on, 7 redirected", _NEW),
    Message("end", "Final result=ALLOW ({code:d}). Bypass mark set.", "another program approved it", "v3.25"),
    Message("end", "Final result=ALLOW ({code:d}). Bypass mark bit set.", "another program approved it", "v3.18", "v3.24"),
    *(
        Message("end", f"Final result=ALLOW ({{code:d}}). {text}", meaning, since, tagged=tagged)
        for tagged in (True, False)
        for text, meaning, since in (
            ("Bypass mark set at bpfnat local WL", "from bpfout.cali to a pod of this node", "v3.27"),
            ("Bypass mark set at bpfnat remote WL", "from bpfout.cali to another node", "v3.27"),
            ("Accepted by XDP.", "an untracked policy accepted it", "v3.27"),
        )
    ),
    Message("end", "Final result=DENY ({code:x}). Program execution time: {ns:d}ns", "the reason, hexadecimal up to v3.29 and decimal since"),
    Message("end", "Final result=DENY ({code:x}). Dropped due to packet rate QoS.", "another program approved it, but the pod's bucket is empty", "v3.31", "v3.31", "QoS limit of the pod"),
    # preamble, and what has no tag
    *(
        Message("preamble", f"{kind}_preamble iface {{interface:w}} {text}", meaning, "v3.27", cause=cause, tagged=False)
        for kind in ("tc", "xdp")
        for text, meaning, cause in (
            ("failed to call main {index:d}", "the chain's first slot is empty", _PREAMBLE),
            ("failed to call debug main {index:d}", "the debug chain's first slot is empty", _PREAMBLE),
            ("failed to call log filter {index:d}", "bpfLogFilters: the packet goes on without a filter", ""),
            ("jump to {index:d}", "the chain is entered there", ""),
        )
    ),
    Message("preamble", "tc_preamble iface {interface:w}", "the interface", "v3.27", tagged=False),
    Message("preamble", "xdp_preamble iface {interface:w}", "the interface", "v3.27", tagged=False),
    *(
        Message("preamble", text, meaning, "v3.25", cause=cause, tagged=tagged)
        for tagged in (True, False)
        for text, meaning, cause in (
            ("Main program not loaded for IP packet version {ethertype:d}, DROP", "no programs for this IP version", "Calico has no programs for this IP version on the interface"),
            ("State map lookup failed: DROP", "the state map cannot be read", "Calico's state map cannot be read"),
            ("State map globals lookup failed: DROP", "the state map cannot be read", "Calico's state map cannot be read"),
            ("State map xdp globals lookup failed: DROP", "the state map cannot be read", "Calico's state map cannot be read"),
            ("no globals: DROP", "the programs were patched wrongly", "Calico's programs have no settings"),
            ("no counters for {ifindex:d}: DROP", "no row in the counters map", "the interface has no row in Calico's counters map"),
            ("Counters map lookup failed: DROP", "no row in the counters map", "the interface has no row in Calico's counters map"),
            ("No counters: DROP", "no row in the counters map", "the interface has no row in Calico's counters map"),
        )
    ),
    # log action
    Message("log-action", "policy ALLOWED  proto {proto:d} src {src:ip}:{sport:d} dest {dst:ip}:{dport:d}", "a policy with action Log, at every log level", _NEW),
    Message("log-action", "policy ALLOWED proto {proto:d} src {src:ip}:{sport:d} dest {dst:ip}:{dport:d}", "a policy with action Log, at every log level", "v3.30"),
    Message("log-action", "policy DENIED   proto {proto:d} src {src:ip}:{sport:d} dest {dst:ip}:{dport:d}", "a policy with action Log, at every log level", _NEW),
    Message("log-action", "policy DENIED  proto {proto:d} src {src:ip}:{sport:d} dest {dst:ip}:{dport:d}", "a policy with action Log, at every log level", _NEW),
    Message("log-action", "ALLOWED", "the same on kernels before 5.16", _NEW, tagged=False),
    Message("log-action", "DENIED", "the same on kernels before 5.16", _NEW, tagged=False),
    # connect-time
    Message("connect-time", "NAT miss.", "not a service: the usual case"),
    Message("connect-time", "Noop program executing", "connect-time load balancing is off", until="v3.19"),
    Message("connect-time", "calico_connect_v{version:d}{rest:t}", "a socket connects"),
    Message("connect-time", "connect_v{version:d} {rest:t}", "a socket connects"),
    Message("connect-time", "sendmsg_v{version:d} {rest:t}", "a datagram is sent"),
    Message("connect-time", "recvmsg_v{version:d} {rest:t}", "a datagram is received"),
    Message("connect-time", "sendmsg_v{version:d}", "a datagram is sent", "v3.13", "v3.26"),
    Message("connect-time", "connect_v{version:d}: not implemented for v6 yet", "IPv6 is left alone", until="v3.26"),
    Message("connect-time", "recvmsg_v{version:d}: not implemented for v6 yet", "IPv6 is left alone", until="v3.26"),
    Message("connect-time", "SOCK_STREAM -> assuming TCP", "a stream socket"),
    Message("connect-time", "SOCK_DGRAM -> assuming UDP", "a datagram socket"),
    Message("connect-time", "SOCK_DGRAM -> assuming UDP - not supported", "a datagram socket, left alone", until="v3.19"),
    Message("connect-time", "Unknown socket type: {type:d}", "neither stream nor datagram"),
    Message("connect-time", "Lookup: ip={ip:ip} port={port:d}(BE) cookie={cookie:x}", "which service the socket sent to"),
    Message("connect-time", "Failed to update map{rest:t}", "the map is full"),
    Message("connect-time", "Store: ip={ip:x}{rest:t}", "the service of the socket is remembered"),
    Message("connect-time", "revnat miss for {ip:x}:{port:d}", "no service is remembered"),
    Message("connect-time", "revnat miss for {ip:ip}:{port:d}", "no service is remembered", _NEW),
    Message("connect-time", "Failed to update ct_nats map rc={rc:d}", "the map is full"),
    Message("connect-time", "unexpected sock type {type:d}", "neither TCP nor UDP"),
    Message("cleaner", "Scanning conntrack map for expired non-NAT entries...", "a round begins", "v3.30"),
    Message("cleaner", "Checking: proto={proto:d} {ip:ip}:{port:d}", "one entry", "v3.30"),
    Message("cleaner", "  <-> {ip:ip}:{port:d} age={age:d}s", "its other end", "v3.30"),
    Message("cleaner", "  Reverse NAT: proto={proto:d} {ip:ip}:{port:d}", "the entry behind it", "v3.30"),
    Message("cleaner", "    <->{ip:ip}:{port:d} age={age:d}s", "its other end", "v3.30"),
    Message("cleaner", "  <->{ip:ip}:{port:d} age={age:d}s", "its other end", "v3.30"),
    Message("cleaner", "  EXPIRED: {rest:t}", "older than its time-out", "v3.30"),
    Message("cleaner", "  INVALID: {rest:t}", "half of a NAT pair is missing", "v3.30"),
    Message("cleaner", "  RESURRECTED: {rest:t}", "a packet came meanwhile", "v3.30"),
    Message("cleaner", "  MISSING: {rest:t}", "gone meanwhile", "v3.30"),
    Message("cleaner", "  Failed to queue entry, queue full?", "cali_v4_ccq is full", "v3.30"),
    Message("cleaner", "Re-checking: proto={proto:d} {ip:ip}:{port:d}", "before it is deleted", "v3.30"),
    Message("cleaner", "First pass complete, expired {expired:d} KVs so far of {total:d} total.", "entries without NAT are done", "v3.30"),
    Message("cleaner", "Processing NAT entries...", "pairs are next", "v3.30"),
    Message("cleaner", "Conntrack cleanup complete: expired {expired:d} KVs of {total:d} total.", "a round ends", "v3.30"),
)  # fmt: skip


@cache
def pattern(message: Message) -> re.Pattern[str]:
    """Matches the whole of a line's text, with the values by name."""
    parts = _FIELD.split(message.template)  # literal, name, kind, literal, ...
    text = re.escape(parts[0])
    for name, kind, literal in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        text += f"(?P<{name}>{_KINDS[kind]}){re.escape(literal)}"
    return re.compile(text, re.DOTALL)


def render(message: Message, values: Mapping[str, str | int], release: tuple[int, int]) -> str:
    """The text as a program of *release* prints it. *values*: by name; addresses as people write them."""

    def shown(found: re.Match[str]) -> str:
        value = values[found[1]]
        if found[2] == "x":
            return f"{value:x}"
        if found[2] != "ip":
            return str(value)
        parsed = ip_address(str(value))
        if release < DOTTED_SINCE:
            return f"{int(parsed) & 0xFFFFFFFF:x}"
        return f"[{parsed.exploded}]" if parsed.version == 6 else str(parsed)

    return _FIELD.sub(shown, message.template)


def _index(tagged: bool) -> dict[str, list[Message]]:
    """By the first two characters, those with more fixed text first: the most special wording wins."""
    found: defaultdict[str, list[Message]] = defaultdict(list)
    for message in MESSAGES:
        if message.tagged is tagged:
            found[message.template[:2]].append(message)
    for each in found.values():
        each.sort(key=lambda message: -len(_FIELD.sub("", message.template)))
    return dict(found)


_TAGGED, _UNTAGGED = _index(True), _index(False)


def classify(text: str) -> Message | None:
    """The wording that a tagged line's message has, or None. *text*: without tag and newline."""
    return _find(_TAGGED, text)


def classify_untagged(text: str) -> Message | None:
    """The same for a line without a tag."""
    return _find(_UNTAGGED, text)


def _find(index: dict[str, list[Message]], text: str) -> Message | None:
    return next((each for each in index.get(text[:2], ()) if pattern(each).fullmatch(text)), None)
