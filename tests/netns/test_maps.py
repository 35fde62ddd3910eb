"""The lab's maps after real traffic: conntrack on both nodes, and every breakage that walk names."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calitrace.kernel import netns, syscall
from calitrace.lab.topology import Lab
from tests.netns.conftest import COMMAND, LOST_S, calitrace, on, tcp

pytestmark = pytest.mark.root
TARGET = ("10.10.0.1", 30080)
POD = "10.65.1.2"
FRONTEND = struct.pack("<I4sHB5x", 56, bytes([10, 10, 0, 1]), 30080, 6)


def maps(lab: Lab, node: str, *words: str) -> list[dict[str, Any]]:
    """What a maps command says about a node, as JSON."""
    done = calitrace("maps", *words, "--bpffs", str(lab.pins / node), "-o", "json")
    assert done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def tracked(lab: Lab, node: str, sport: int) -> list[dict[str, Any]]:
    """A node's conntrack entries of the client's connection from that port, forward entries first."""
    found = [e for e in maps(lab, node, "conntrack", "dump") if sport in (e["port_a"], e["port_b"])]
    return sorted(found, key=lambda e: e["type"])


def state(lab: Lab, node: str, sport: int) -> str:
    """The state of that connection on a node."""
    (found,) = [e["state"] for e in tracked(lab, node, sport) if e["type"] != "nat-fwd"]
    return str(found)


def test_a_connection_through_the_nodeport(lab: Lab) -> None:
    with tcp(lab, "client", *TARGET) as connection:
        sport = connection.getsockname()[1]
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
        for node, tunnel in (("node-a", "10.10.0.2"), ("node-b", "10.10.0.1")):
            forward, reverse = tracked(lab, node, sport)
            assert (forward["type"], reverse["type"]) == ("nat-fwd", "nat-rev")
            for end in ("addr_a", "port_a", "addr_b", "port_b"):
                assert forward[f"rev_{end}"] == reverse[end]
            assert (reverse["state"], reverse["tun_ip"]) == ("ESTABLISHED", tunnel)
            assert (reverse["orig_dst"], reverse["orig_dport"]) == TARGET
            assert {(reverse["addr_a"], reverse["port_a"]), (reverse["addr_b"], reverse["port_b"])} == {
                (POD, 8080),
                ("10.10.0.100", sport),
            }
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert [state(lab, node, sport) for node in ("node-a", "node-b")] == ["CLOSED", "CLOSED"]


def test_a_reset_connection(lab: Lab) -> None:
    connection = tcp(lab, "client", *TARGET)
    sport = connection.getsockname()[1]
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert [state(lab, node, sport) for node in ("node-a", "node-b")] == ["RESET", "RESET"]


def test_a_blocked_connection_stays_in_syn_sent(lab: Lab) -> None:
    assert on(lab, "fault", "vxlan-blocked").returncode == 0
    try:
        with netns.inside(lab.namespace("client")):
            client = socket.socket()
        with client:
            client.settimeout(LOST_S)
            with pytest.raises(TimeoutError):
                client.connect(TARGET)
            sport = client.getsockname()[1]
            assert state(lab, "node-a", sport) == "SYN-SENT"
            assert tracked(lab, "node-b", sport) == []
    finally:
        assert on(lab, "heal").returncode == 0


class Edit:
    """Changes entries of a node's pinned maps, and puts back what was there."""

    def __init__(self, lab: Lab) -> None:
        self._pins = lab.pins / "node-a"
        self._undo: list[tuple[str, bytes, bytes | None]] = []

    def entry(self, name: str, key: bytes, value: bytes | None) -> None:
        """Set an entry, or remove it."""
        descriptor = syscall.object_get(self._pins / name)
        try:
            info = syscall.map_info(descriptor)
            self._undo.append((name, key, syscall.map_lookup(descriptor, key, info.value_size)))
            if value is None:
                syscall.map_delete(descriptor, key)
            else:
                syscall.map_update(descriptor, key, value)
        finally:
            os.close(descriptor)

    def undo(self) -> None:
        """Put everything back."""
        for name, key, value in reversed(list(self._undo)):
            self.entry(name, key, value)


@pytest.fixture
def edit(lab: Lab) -> Iterator[Edit]:
    """node-a's maps, put back afterwards."""
    made = Edit(lab)
    yield made
    made.undo()


def test_the_other_entry_of_a_pair_is_shown_or_missed(lab: Lab, edit: Edit, tmp_path: Path) -> None:
    where = ("--bpffs", str(lab.pins / "node-a"))
    with tcp(lab, "client", *TARGET) as connection:
        sport = connection.getsockname()[1]
        forward, reverse = maps(lab, "node-a", "conntrack", "get", str(sport))[::-1]
        assert (forward["type"], reverse["type"]) == ("nat-fwd", "nat-rev")
        assert [each["pair"][0]["type"] for each in (forward, reverse)] == ["nat-rev", "nat-fwd"]
        assert forward["from"] == ("a" if forward["port_a"] == sport else "b")
        request = reverse["ab"] if reverse["from"] == "a" else reverse["ba"]
        assert request["interface"] == "ens192"
        config = tmp_path / "felix.yaml"
        config.write_text(
            "kind: FelixConfiguration\nmetadata: {name: default}\nspec: {bpfConntrackTimeouts: {tcpEstablished: 7m}}\n"
        )
        done = calitrace("maps", "conntrack", "get", str(sport), *where, "--felix-config", str(config))
        assert "time-out   420 s (tcpEstablished, FelixConfiguration default)" in done.stdout
        key = (
            struct.pack("<I", 6)
            + b"".join(socket.inet_aton(forward[f"rev_addr_{end}"]) for end in "ab")
            + struct.pack("<HH", forward["rev_port_a"], forward["rev_port_b"])
        )
        edit.entry("cali_v4_ct4", key, None)
        done = calitrace("maps", "conntrack", "dump", *where)
        assert "nat-fwd entries without their reverse entry" in done.stderr
        assert f"10.10.0.100:{sport} -> 10.10.0.1:30080" in done.stderr


def broken(lab: Lab, sport: int = 0, port: int = 30080) -> list[str]:
    """What walk finds broken on node-a for the client."""
    source = f"10.10.0.100:{sport}" if sport else "10.10.0.100"
    steps = maps(lab, "node-a", "walk", source, f"10.10.0.1:{port}/tcp", "--ingress", "ens192")
    return [step["broken"] for step in steps if step["broken"]]


def index(lab: Lab, name: str) -> int:
    """ifindex of one of node-a's interfaces."""
    with netns.inside(lab.namespace("node-a")):
        return socket.if_nametoindex(name)


def test_walk_without_breakage(lab: Lab) -> None:
    assert broken(lab) == []
    assert broken(lab, port=30081) == []


def test_walk_no_frontend(lab: Lab, edit: Edit) -> None:
    edit.entry("cali_v4_nat_fe3", FRONTEND, None)
    edit.entry("cali_v4_nat_fe3", struct.pack("<I4sHB5x", 56, b"\xff" * 4, 30080, 6), None)
    assert broken(lab) == ["no frontend"]


def test_walk_no_backend(lab: Lab, edit: Edit) -> None:
    edit.entry("cali_v4_nat_be", struct.pack("<II", 1, 0), None)
    assert broken(lab) == ["frontend without backend"]


def test_walk_no_route(lab: Lab, edit: Edit) -> None:
    edit.entry("cali_v4_routes", struct.pack("<I4s", 26, bytes([10, 65, 1, 0])), None)
    assert broken(lab) == ["no route"]


def test_walk_no_ifstate(lab: Lab, edit: Edit) -> None:
    edit.entry("cali_iface4", struct.pack("<I", index(lab, "cali1a2b3c4d5e6")), None)
    assert broken(lab, port=30081) == ["no ifstate"]
    edit.entry("cali_iface4", struct.pack("<I", index(lab, "ens192")), None)
    assert broken(lab) == ["no ifstate"]


def test_walk_stale_and_disagreeing_conntrack(lab: Lab, edit: Edit) -> None:
    with tcp(lab, "client", *TARGET) as connection:
        sport = connection.getsockname()[1]
        assert broken(lab, sport) == []
        edit.entry("cali_v4_nat_fe3", FRONTEND, struct.pack("<5I", 2, 1, 1, 0, 0))
        assert broken(lab, sport) == ["conntrack and NAT disagree"]
        edit.undo()
        for service in (1, 8):
            edit.entry(
                "cali_v4_nat_be", struct.pack("<II", service, 0), struct.pack("<4sHxx", bytes([10, 65, 1, 9]), 1)
            )
        assert broken(lab, sport) == ["stale conntrack"]


def verdict(lab: Lab, source: str, target: str, *words: str) -> str:
    """What walk says becomes of a packet on node-a."""
    return str(maps(lab, "node-a", "walk", source, target, *words)[-1]["found"])


def test_walk_ends_with_what_becomes_of_the_packet(lab: Lab, edit: Edit) -> None:
    assert verdict(lab, "10.10.0.100", "10.10.0.1:30080/tcp", "--ingress", "ens192") == (
        "forwarded in Calico's VXLAN to node 10.10.0.2, for 10.65.1.2:8080"
    )
    assert verdict(lab, "10.10.0.100", "10.10.0.1:30081/tcp") == "delivered to 10.65.0.2:8080 by cali1a2b3c4d5e6"
    assert verdict(lab, "10.10.0.100", "10.10.0.1:30082/tcp") == (
        "refused with an ICMP error (frontend without backend)"
    )
    assert verdict(lab, "10.10.0.100", "10.10.0.1:30087/tcp") == "dropped, RT_UNKNOWN (no route)"
    edit.entry("cali_v4_nat_fe3", FRONTEND, struct.pack("<5I", 1, 0xFFFFFFFF, 0, 0, 0))
    assert verdict(lab, "10.10.0.100", "10.10.0.1:30080/tcp").endswith("(source not allowed)")
    edit.entry("cali_v4_nat_fe3", FRONTEND, struct.pack("<5I", 1, 1, 0, 0, 1))
    done = calitrace("maps", "walk", "10.10.0.100", "10.10.0.1:30080/tcp", "--bpffs", str(lab.pins / "node-a"))
    assert "service 1: none on this node (external-local)" in done.stdout
    inside = ("10.65.0.2", "10.10.0.1:30080/tcp")
    assert verdict(lab, *inside) == "forwarded by the host's routes, for 10.65.1.2:8080"


def test_walk_spoofed_source(lab: Lab) -> None:
    pod = ("--ingress", "cali1a2b3c4d5e6")
    assert verdict(lab, "10.65.0.2", "10.10.0.1:30080/tcp", *pod).startswith("forwarded by the host's routes")
    assert verdict(lab, "10.65.0.9", "10.10.0.1:30080/tcp", *pod).endswith("(not an address of this pod)")


def test_walk_interface_not_ready(lab: Lab, edit: Edit) -> None:
    key = struct.pack("<I", index(lab, "cali1a2b3c4d5e6"))
    edit.entry("cali_iface4", key, struct.pack("<I16s32x", 1, b"cali1a2b3c4d5e6"))
    assert broken(lab, port=30081) == ["no ifstate"]


def test_walk_blackhole(lab: Lab, edit: Edit) -> None:
    edit.entry("cali_v4_routes", struct.pack("<I4s", 32, bytes([10, 65, 1, 2])), struct.pack("<Q", 0x100))
    assert broken(lab) == ["blackhole"]


def test_walk_forward_entry_alone(lab: Lab, edit: Edit) -> None:
    with tcp(lab, "client", *TARGET) as connection:
        sport = connection.getsockname()[1]
        reverse = next(e for e in tracked(lab, "node-a", sport) if e["type"] == "nat-rev")
        ends = b"".join(socket.inet_aton(reverse[f"addr_{end}"]) for end in "ab")
        key = struct.pack("<I8sHH", 6, ends, reverse["port_a"], reverse["port_b"])
        edit.entry("cali_v4_ct4", key, None)
        assert broken(lab, sport) == ["stale conntrack"]


def calico_program() -> tuple[int, int]:
    """Id and descriptor of a tc program of the lab's."""
    for identifier in syscall.program_ids():
        descriptor = syscall.program_fd(identifier)
        if syscall.program_info(descriptor).name == "cali_to_wep":
            return identifier, descriptor
        os.close(descriptor)
    raise AssertionError("the lab has no such program")


def test_walk_policy_program(lab: Lab, edit: Edit) -> None:
    """A jump map, which the lab does not have, with and without the program that ifstate names."""
    name = "cali_jump_egr2"
    descriptor = syscall.map_create(3, 4, 4, 16, name=name)
    pin = lab.pins / "node-a" / name
    try:
        syscall.object_pin(descriptor, pin)
        assert broken(lab, port=30081) == []  # ifstate names none
        key = struct.pack("<I", index(lab, "cali1a2b3c4d5e6"))
        edit.entry("cali_iface4", key, struct.pack("<I16s3i20x", 3, b"cali1a2b3c4d5e6", -1, -1, 7))
        assert broken(lab, port=30081) == ["no policy program"]
        identifier, program = calico_program()
        try:
            syscall.map_update(descriptor, struct.pack("<I", 7), struct.pack("<I", program))
        finally:
            os.close(program)
        steps = maps(lab, "node-a", "walk", "10.10.0.100", "10.10.0.1:30081/tcp")
        assert [step["broken"] for step in steps if step["broken"]] == []
        (policy,) = [step["found"] for step in steps if step["lookup"] == "policy"]
        assert policy == f"program {identifier} at 7 of cali_jump_egr decides"
    finally:
        pin.unlink(missing_ok=True)
        os.close(descriptor)


def test_live_and_offline_say_the_same(lab: Lab, tmp_path: Path) -> None:
    file = str(tmp_path / "a.calitrace")
    where = ("--bpffs", str(lab.pins / "node-a"))
    with tcp(lab, "client", *TARGET):  # its reply comes through the tunnel, and leaves a neighbour
        pass
    assert calitrace("maps", "snapshot", "-w", file, *where).returncode == 0
    for subject in ("nat", "routes", "ifstate", "arp", "policy"):
        live, offline = calitrace("maps", subject, "dump", *where), calitrace("maps", subject, "dump", "-r", file)
        assert (offline.returncode, offline.stdout, offline.stderr) == (0, live.stdout, live.stderr)
        assert live.stdout or subject == "policy"
    packet = ("maps", "walk", "10.10.0.100", "10.10.0.1:30081/tcp", "--ingress", "ens192")
    assert calitrace(*packet, *where).stdout == calitrace(*packet, "-r", file).stdout


def test_the_namespace_chooses_between_the_maps_of_two_nodes(lab: Lab) -> None:
    for node in ("node-a", "node-b"):
        done = calitrace("maps", "routes", "dump", "--bpffs", str(lab.pins), "--netns", lab.namespace(node))
        assert (done.returncode, done.stdout) == (
            0, calitrace("maps", "routes", "dump", "--bpffs", str(lab.pins / node)).stdout,
        )  # fmt: skip
    for where in ((), ("--netns", lab.namespace("client"))):
        done = calitrace("maps", "routes", "dump", "--bpffs", str(lab.pins), *where)
        assert (done.returncode, "the maps of 2 nodes lie below" in done.stderr) == (2, True)


def test_diff_finds_the_service_that_differs(lab: Lab, edit: Edit, tmp_path: Path) -> None:
    where = ("--bpffs", str(lab.pins / "node-a"))
    files = [str(tmp_path / name) for name in ("a", "b")]
    assert calitrace("maps", "snapshot", "-w", files[0], *where).returncode == 0
    edit.entry("cali_v4_nat_fe3", FRONTEND, struct.pack("<5I", 1, 0, 0, 0, 0))
    assert calitrace("maps", "snapshot", "-w", files[1], *where).returncode == 0
    done = calitrace("maps", "diff", *files, "--check")
    assert done.returncode == 1
    assert "service    10.10.0.1:30080/tcp: backends [10.65.1.2:8080] -> []" in done.stdout
    assert done.stdout.endswith("1 services differ\n")


def test_diff_of_two_nodes_tells_services_alone(lab: Lab, edit: Edit, tmp_path: Path) -> None:
    def snapshot(node: str, name: str) -> str:
        file = str(tmp_path / name)
        assert calitrace("maps", "snapshot", "-w", file, "--bpffs", str(lab.pins / node)).returncode == 0
        return file

    there = snapshot("node-b", "b")
    whole = calitrace("maps", "diff", snapshot("node-a", "a"), there, "--check")
    assert (whole.returncode, whole.stdout.splitlines()[0]) == (0, "0 services differ")
    assert "two nodes, a is 10.10.0.1, b is 10.10.0.2" in whole.stdout
    edit.entry("cali_v4_nat_fe3", FRONTEND, None)
    edit.entry("cali_v4_nat_be", struct.pack("<II", 2, 0), None)
    done = calitrace("maps", "diff", snapshot("node-a", "a2"), there, "--check")
    assert done.returncode == 1
    assert done.stdout.splitlines()[:3] == [
        "service    255.255.255.255:30081/tcp: backends [missing] -> [10.65.0.2:8080]",
        "service    this node:30080/tcp: only in b",
        "service    this node:30081/tcp: backends [missing] -> [10.65.0.2:8080]",
    ]


def between(lab: Lab, *words: str) -> str:
    """What a command says that reads node-a's maps twice, with a connection between the readings."""
    command = (*COMMAND, *words, "--bpffs", str(lab.pins / "node-a"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stderr.readline().startswith("read once")
        with tcp(lab, "client", *TARGET) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
        return running.stdout.read()


def test_diff_now_and_later(lab: Lab) -> None:
    lines = between(lab, "maps", "diff", "--wait", "2")
    assert "conntrack  tcp " in lines
    assert "counter    ens192 tc ingress TOTAL_PACKETS: " in lines


def test_conntrack_remove_needs_permission_and_takes_only_what_it_names(lab: Lab) -> None:
    with tcp(lab, "client", *TARGET) as connection:
        sport = connection.getsockname()[1]
        words = ("maps", "conntrack", "remove", "tcp", "10.10.0.100", "10.10.0.1", "--bpffs", str(lab.pins / "node-a"))
        assert calitrace(*words).returncode == 2
        dry = calitrace(*words, "--dry-run")
        assert f"10.10.0.100:{sport}" in dry.stdout
        assert len(tracked(lab, "node-a", sport)) == 2
        assert calitrace(*words, "--allow-system-changes").returncode == 0
        assert [e["type"] for e in tracked(lab, "node-a", sport)] == ["nat-rev"]


def test_counters_as_rates(lab: Lab) -> None:
    lines = between(lab, "maps", "counters", "dump", "--iface", "ens192", "--interval", "2", "-j")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert {row["hook"]: row["per_second"]["TOTAL_PACKETS"] > 0 for row in rows}["tc ingress"]


def test_policy_rules_with_their_hits(lab: Lab) -> None:
    with tcp(lab, "client", *TARGET):
        words = ("maps", "policy", "dump", "calif00dbeef012", "ingress", "--bpffs", str(lab.pins / "node-b"))
        done = calitrace(*words, "--policy-dir", str(lab.policy_directory("node-b")), "-o", "json")
    (rule,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert rule["rule"] == "default.allow-lab-clients rule 0 (allow)"
    assert rule["packets"] > 0
