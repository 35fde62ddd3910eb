"""``calitrace drops`` on the lab: every cause against the injection's own count, and exact totals in a flood."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from calitrace.kernel import netns
from calitrace.lab.topology import Lab
from tests.netns.conftest import calitrace, changed, entry, listening, on, tcp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

TIMEOUT_S = 120
COUNT = 17
TC = ("tc", "qdisc")
CLIENT = "10.10.0.100"


def finished(process: subprocess.Popen[str], *ports: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Interrupt it once it has shown COUNT drops from each of these *ports*; its drops and its summary.

    The kernel may still be at work on what was sent: who interrupts at once misses it.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    missing, lines = Counter(dict.fromkeys(ports, COUNT)), []
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        while any(missing[port] > 0 for port in ports) and (line := process.stdout.readline()):
            lines.append(line)
            missing[json.loads(line).get("sport")] -= 1
        process.send_signal(signal.SIGINT)
        lines += process.stdout.readlines()
        errors = process.stderr.read()
        process.wait()
    finally:
        watchdog.cancel()
    assert process.returncode == 0, errors
    *drops, summary = map(json.loads, lines)
    assert summary["type"] == "summary"
    parts = ("shown", "harmless", "filtered", "limited", "unsampled", "malformed", "events_lost")
    assert summary["drops_seen"] == sum(summary[part] for part in parts), summary
    assert summary["unread"] == 0
    assert summary["shown"] == sum(each["type"] == "drop" for each in drops)
    return drops, summary


def send(lab: Lab, part: str, address: str, port: int, count: int, payload: bytes = b"x") -> int:
    """Datagrams from one port; that port."""
    with netns.inside(lab.namespace(part)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            with contextlib.suppress(OSError):  # refused, or no room in the queue: a drop, which is what is wanted
                sender.sendto(payload, (address, port))
        return int(sender.getsockname()[1])


def send_bad_checksums(lab: Lab, part: str, source: str, address: str, count: int) -> int:
    """Datagrams whose UDP checksum is wrong; their port."""
    port = 41234
    udp = struct.pack("!HHHH", port, 9, 8, 0xBAD)
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 1, 0, 64, 17, 0, *map(socket.inet_aton, (source, address)))
    with (
        netns.inside(lab.namespace(part)),
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender,
    ):
        for _ in range(count):
            sender.sendto(head + udp, (address, 0))
    return port


@contextlib.contextmanager
def full_queue(lab: Lab, part: str, interface: str) -> Iterator[None]:
    """A queue that takes no packet."""
    with netns.inside(lab.namespace(part)):
        subprocess.run([*TC, "add", "dev", interface, "root", "bfifo", "limit", "1"], check=True)
    try:
        yield
    finally:
        with netns.inside(lab.namespace(part)):
            subprocess.run([*TC, "del", "dev", interface, "root"], check=True)


@pytest.fixture
def healed(lab: Lab) -> Iterator[Lab]:
    """The lab, healed afterwards."""
    yield lab
    assert on(lab, "heal").returncode == 0


def nft(lab: Lab, part: str, rules: str) -> None:
    """Load nftables rules in a namespace of the lab."""
    with netns.inside(lab.namespace(part)):
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


@pytest.mark.parametrize("level", ["off", "debug"])
@pytest.mark.parametrize(
    ("fault", "target", "calico"),
    [
        ("policy-deny", ("10.10.0.1", 30053), ("DROPPED_BY_POLICY", "denied by policy", True)),
        ("rpf", ("10.10.0.1", 30053), ("", "reverse path", False)),
    ],
)
def test_each_cause_against_its_own_count(
    healed: Lab, level: str, fault: str, target: tuple[str, int], calico: tuple[str, str, bool]
) -> None:
    assert on(healed, "log-level", level).returncode == 0
    assert on(healed, "fault", fault).returncode == 0
    nft(healed, "pod-a", "table ip t { chain c { type filter hook input priority 0; udp dport 7777 drop; }; }")
    try:
        with full_queue(healed, "pod-a", "eth0"), listening("drops", "-o", "json", "--all") as process:
            ports = {
                send(healed, "client", *target, COUNT): "calico",
                send(healed, "node-a", "10.65.0.2", 7777, COUNT): "NETFILTER_DROP",
                send(healed, "node-a", "10.65.0.2", 9, COUNT): "NO_SOCKET",
                send(healed, "pod-a", "10.10.0.1", 9, COUNT): "QDISC_DROP",
                send_bad_checksums(healed, "node-a", "10.10.0.1", "10.65.0.2", COUNT): "UDP_CSUM",
            }
            drops, summary = finished(process, *ports)
    finally:
        nft(healed, "pod-a", "delete table ip t")
    injected = [each for each in drops if each["sport"] in ports and each["proto"] == "udp"]
    found = Counter(
        (ports[each["sport"]], "calico" if each["by_calico"] else each["skb_drop_reason"]) for each in injected
    )
    assert found == {(cause, cause): COUNT for cause in ports.values()}  # precision and recall are both 1
    assert summary["events_lost"] == summary["limited"] == 0
    reason, meaning, with_rule = calico
    for each in injected:
        if each["by_calico"]:
            assert each["calico_reason"] == (reason or None)
            assert meaning in each["cause"]
            assert bool(each["rules"]) == with_rule
            known = level == "debug" or with_rule
            assert each["sources"] == (["log", "state"] if level == "debug" else ["state", *["routes"] * (not known)])
            assert each["confidence"] == ("proven" if known else "likely")


def frontend(address: str, port: int, proto: int) -> bytes:
    """The key of a service that any source may use."""
    return struct.pack("<I4sHB4sB", 56, socket.inet_aton(address), port, proto, bytes(4), 0)


def send_raw(lab: Lab, part: str, packet: bytes, address: str, count: int) -> None:
    """Whole IP packets; the kernel writes length and checksum of the header."""
    with (
        netns.inside(lab.namespace(part)),
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender,
    ):
        for _ in range(count):
            sender.sendto(packet, (address, 0))


def ip_header(source: str, address: str, proto: int) -> bytes:
    """20 bytes."""
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 1, 0, 64, proto, 0, *map(socket.inet_aton, (source, address)))


@pytest.mark.parametrize("level", ["off", "debug"])
def test_reasons_that_calico_records(healed: Lab, level: str) -> None:
    """Source ranges, a tunnel from no node, a packet too short; beside what only looks like Calico's."""
    assert on(healed, "log-level", level).returncode == 0
    assert on(healed, "fault", "no-backend").returncode == 0
    pin = healed.pins / "node-a" / "cali_v4_nat_fe3"
    key = frontend("10.10.0.1", 30053, 17)
    refused = entry(pin, key)[:4] + b"\xff" * 4 + entry(pin, key)[8:]
    inner = ip_header(CLIENT, "10.65.1.2", 17) + struct.pack("!HHHH", 1, 5353, 8, 0)
    vxlan = b"\x08\0\0\0\xca\x11\xc0\0" + bytes(12) + b"\x08\0" + inner
    with changed(pin, key, refused), listening("drops", "-o", "json", "--all") as process:
        ranges = send(healed, "client", "10.10.0.1", 30053, COUNT)
        tunnel = send(healed, "client", "10.10.0.1", 4789, COUNT, vxlan)
        send_raw(healed, "client", ip_header(CLIENT, "10.10.0.1", 6) + b"\x9c\x40\0\x50", "10.10.0.1", COUNT)
        ack = struct.pack("!HHIIBBHHH", 40009, 30080, 1, 1, 0x50, 0x10, 100, 0, 0)
        send_raw(healed, "client", ip_header(CLIENT, "10.10.0.1", 6) + ack, "10.10.0.1", COUNT)  # of no connection
        syn = struct.pack("!HHIIBBHHH", 40010, 30080, 1, 0, 0x50, 2, 100, 0, 0)
        send_raw(healed, "client", ip_header(CLIENT, "10.10.0.1", 6) + syn, "10.10.0.1", COUNT)  # it is answered
        drops, summary = finished(process, ranges, 1, 0)
    assert summary["events_lost"] == summary["limited"] == 0
    blamed = [each for each in drops if each["by_calico"] and each["src"] == CLIENT]
    found = Counter((each["calico_reason"], each["proto"], each["sport"]) for each in blamed)
    assert found == {
        ("UNAUTH_SOURCE", "udp", ranges): COUNT,
        ("UNAUTH_SOURCE", "udp", 1): COUNT,  # named by the packet in the tunnel
        ("SHORT", "tcp", 0): COUNT,
    }
    assert all(each["packet"][0].startswith(f"udp {CLIENT}:{tunnel} ") for each in blamed if each["sport"] == 1)
    for each in blamed:
        assert (each["interface"], each["hook"]) == ("ens192", "tc ingress")
        sure = level == "debug" or each["calico_reason"] != "SHORT"
        assert each["confidence"] == ("proven" if sure else "likely")
        assert each["sources"] == (["log", "state"] if level == "debug" else ["state"])


@pytest.mark.parametrize("level", ["off", "debug"])
def test_a_packet_that_conntrack_refuses(healed: Lab, level: str) -> None:
    assert on(healed, "log-level", level).returncode == 0
    with tcp(healed, "client", "10.10.0.1", 30080) as connection:
        sport = connection.getsockname()[1]
        addresses = map(socket.inet_aton, ("10.65.1.2", CLIENT))
        key = struct.pack("<I4s4sHH", 6, *addresses, 8080, sport)
        pin = healed.pins / "node-b" / "cali_v4_ct4"
        tracked = bytearray(entry(pin, key))
        for bits in (40, 64):  # of both legs
            tracked[bits] &= ~16  # approved
        with changed(pin, key, bytes(tracked)), listening("drops", "-o", "json", "--calico-only") as process:
            connection.sendall(b"x")
            drops, _ = finished(process)
    mine = [each for each in drops if each["sport"] == sport]
    assert mine
    for each in mine:
        assert (each["calico_reason"], each["interface"], each["hook"]) == (None, "calif00dbeef012", "tc egress")
        assert ("only one side's policy" if level == "debug" else "invalid in conntrack") in each["cause"]


def test_a_pod_that_sends_from_another_address(healed: Lab, tmp_path: Path) -> None:
    """A silent drop, which the maps explain; and a counter that rose with a drop that Calico counts."""
    assert on(healed, "log-level", "off").returncode == 0
    assert on(healed, "fault", "policy-deny").returncode == 0
    datagram = ip_header("10.65.0.99", "10.10.0.100", 17) + struct.pack("!HHHH", 4001, 9, 8, 0)
    file = str(tmp_path / "j.calitrace")
    with listening("drops", "-o", "json", "--calico-only", "-w", file) as process:
        send_raw(healed, "pod-a", datagram, "10.10.0.100", COUNT)
        port = send(healed, "client", "10.10.0.1", 30053, COUNT)
        drops, _ = finished(process, port, 4001)
    silent = [each for each in drops if each["src"] == "10.65.0.99"]
    assert len(silent) == COUNT
    for each in silent:
        assert "not an address of this pod" in each["cause"]
        assert (each["confidence"], each["sources"]) == ("likely", ["state", "maps"])
        assert (each["calico_reason"], each["hook"]) == (None, "tc ingress")
    denied = [each for each in drops if each["sport"] == port]
    assert len(denied) == COUNT
    assert any("counters of this hook rose" in line and "DROPPED_BY_POLICY +" in line
               for each in denied for line in each["evidence"])  # fmt: skip
    offline = calitrace("drops", "-r", file, "-o", "json", "--calico-only").stdout.splitlines()
    assert [json.loads(line) for line in offline][:-1] == drops


def test_a_program_that_ends_before_it_reads_the_packet(healed: Lab) -> None:
    """What the state then holds is another packet's, or nothing: not believed."""
    assert on(healed, "log-level", "off").returncode == 0
    with netns.inside(healed.namespace("node-b")):
        key = struct.pack("<II", socket.if_nametoindex("calif00dbeef012"), 1)
    with changed(healed.pins / "node-b" / "cali_counters6", key, None), listening("drops", "-o", "json") as process:
        port = send(healed, "client", "10.10.0.1", 30053, COUNT)
        drops, _ = finished(process, port)
    mine = [each for each in drops if each["sport"] == port]
    assert len(mine) == COUNT
    for each in mine:
        assert (each["by_calico"], each["calico_reason"], each["rules"]) == (True, None, [])
        assert each["cause"].endswith("it seems: no row for this interface and hook in Calico's counters")
        assert (each["confidence"], each["sources"]) == ("likely", ["counters"])


def test_route_unknown_is_named_by_the_state(lab: Lab) -> None:
    assert on(lab, "log-level", "off").returncode == 0
    with listening("drops", "-o", "json", "--reason", "rt_unknown") as process:
        probes = calitrace(
            *("probe", "nodeport", "10.10.0.1:30087", "--from", lab.namespace("client"), "-c", "5", "--rate", "100"),
            *("--timeout", "0.2", "-o", "json"),
        )
        sports = {json.loads(line)["sport"] for line in probes.stdout.splitlines()[:-1]}
        drops, _ = finished(process)
    mine = [each for each in drops if each["sport"] in sports and each["packet"][0].startswith("tcp SYN ")]
    assert {each["sport"] for each in mine} == sports
    assert {(each["calico_reason"], each["interface"], each["hook"]) for each in mine} == {
        ("RT_UNKNOWN", "ens192", "tc ingress")
    }


def test_journal_filter_and_pcapng(healed: Lab, tmp_path: Path) -> None:
    assert on(healed, "log-level", "off").returncode == 0
    assert on(healed, "fault", "policy-deny").returncode == 0
    journal, pcap = tmp_path / "a.calitrace", tmp_path / "a.pcapng"
    expression = f"udp and src host {CLIENT} and dst port 5353"
    with listening("drops", "-o", "json", "-w", str(journal), "--pcap", str(pcap), expression) as process:
        port = send(healed, "client", "10.10.0.1", 30053, COUNT)
        drops, _ = finished(process, port)
    mine = [each for each in drops if each["sport"] == port]
    assert len(mine) == COUNT
    again = calitrace("drops", "-r", str(journal), "-o", "json", expression)
    assert again.returncode == 0, again.stderr
    assert [json.loads(line) for line in again.stdout.splitlines()][:-1] == drops
    fields = ["-T", "fields", "-e", "udp.srcport", "-e", "frame.comment", "-e", "frame.interface_name"]
    read = subprocess.run(["tshark", "-r", str(pcap), *fields], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in read.stdout.splitlines() if line.startswith(str(port))]
    assert len(rows) == COUNT
    for _, comment, interface in rows:
        assert "dropped by Calico: denied by policy: default.deny-lab-clients rule 0 (deny)" in comment
        assert interface.endswith("node-b/calif00dbeef012")


def test_filters_come_before_the_rate_limit(healed: Lab, tmp_path: Path) -> None:
    assert on(healed, "log-level", "off").returncode == 0
    assert on(healed, "fault", "policy-deny").returncode == 0
    journal = tmp_path / "a.calitrace"
    words = ("-o", "json", "--stack", "--rate-limit", str(COUNT), "-w", str(journal))
    with listening("drops", *words, "-i", "cali*", "udp and src host", CLIENT) as process:
        send(healed, "node-a", "10.65.0.2", 9, 500)  # another interface: it must not use up the limit
        port = send(healed, "client", "10.10.0.1", 30053, COUNT)
        drops, summary = finished(process, port)
    assert [each["sport"] for each in drops] == [port] * COUNT
    assert summary["filtered"] >= 500
    assert summary["limited"] == summary["stacks_lost"] == 0
    for each in drops:
        assert each["stack"][0] == each["location"]
        assert any(frame.startswith("__netif_receive_skb") for frame in each["stack"])
    again = calitrace("drops", "-r", str(journal), "-o", "json")
    assert [json.loads(line) for line in again.stdout.splitlines()][:-1] == drops


def test_a_filter_looks_into_the_tunnel(healed: Lab) -> None:
    assert on(healed, "fault", "vxlan-blocked").returncode == 0
    with listening("drops", "-o", "json", "--all", "udp dst port 30053") as process:
        port = send(healed, "client", "10.10.0.1", 30053, COUNT)
        drops, _ = finished(process, port)
    mine = [each for each in drops if each["sport"] == port]
    assert len(mine) == COUNT
    assert all(len(each["packet"]) == 2 and each["packet"][0].endswith(":4789") for each in mine)


def test_what_comes_up_during_the_run_is_found(spare: Lab, tmp_path: Path) -> None:
    journal = tmp_path / "a.calitrace"
    with listening("drops", "-o", "json", "--calico-only", "-w", str(journal)) as process:
        assert on(spare, "up").returncode == 0
        assert on(spare, "fault", "policy-deny").returncode == 0
        ports = set()
        for _ in range(35):  # longer than it waits between two looks at the machine
            ports.add(send(spare, "client", "10.10.0.1", 30053, 1))
            time.sleep(0.1)
        drops, _ = finished(process)
    mine = [each for each in drops if each["sport"] in ports]
    assert {each["interface"] for each in mine} == {"calif00dbeef012"}
    again = calitrace("drops", "-r", str(journal), "-o", "json", "--calico-only")
    assert {each["interface"] for each in map(json.loads, again.stdout.splitlines()) if each.get("sport") in ports} == {
        "calif00dbeef012"
    }


def test_a_flood_with_a_stopped_reader_is_counted_exactly(lab: Lab) -> None:
    wanted = 200_000
    with listening("drops", "-o", "json", "--top", "--rate-limit", "0", "udp port 9") as process:
        sender = os.fork()
        if not sender:  # at full speed, beside us
            try:
                send(lab, "node-a", "10.65.0.2", 9, wanted)
            finally:
                os._exit(0)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)  # what the reader misses is what is tested
        os.kill(process.pid, signal.SIGCONT)
        assert os.waitpid(sender, 0)[1] == 0
        rows, summary = finished_top(process)
    mine = sum(each["drops"] for each in rows if each["skb_drop_reason"] == "NO_SOCKET" and each["ip_proto"] == 17)
    assert mine >= wanted
    assert sum(each["drops"] for each in rows) + summary["in_no_cell"] == summary["drops_seen"] == summary["runs"]
    assert summary["events_lost"] > 0


def finished_top(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The exact totals and the summary."""
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    *rows, summary = [json.loads(line) for line in output.splitlines()]
    parts = ("shown", "harmless", "filtered", "limited", "unsampled", "malformed", "events_lost")
    assert summary["drops_seen"] == sum(summary[part] for part in parts), summary
    return rows, summary


def test_a_flood_with_stdout_blocked_is_counted_exactly(lab: Lab) -> None:
    with listening("drops", "-o", "json", "--all", "--rate-limit", "0") as process:
        send(lab, "node-a", "10.65.0.2", 9, 50_000)  # nobody reads the pipe yet
        drops, summary = finished(process)
    assert summary["drops_seen"] == summary["runs"] >= 50_000
    assert sum(each["dport"] == 9 for each in drops) + summary["events_lost"] + summary["filtered"] >= 50_000


def test_stdout_that_is_never_read_is_left_when_asked_twice(lab: Lab) -> None:
    with listening("drops", "--all", "--rate-limit", "0") as process:
        assert process.stderr is not None
        send(lab, "node-a", "10.65.0.2", 9, 20_000)
        while process.poll() is None:  # the first one, and those that come while it is blocked
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        said = process.stderr.read().splitlines()[0]
    parts = [part.split(" ", 1) for part in said.split("; ")[0].split(": ")[1].split(", ")]
    assert any(int(number) > 0 for number, name in parts if name == "not looked at")
    assert int(said.split()[0]) == sum(int(number) for number, _ in parts)


def test_a_journal_of_probes_is_read(healed: Lab, tmp_path: Path) -> None:
    journal = str(tmp_path / "a.calitrace")
    assert on(healed, "fault", "policy-deny").returncode == 0
    traced = calitrace(
        *("probe", "nodeport", "10.10.0.1:30053", "--proto", "udp", "-c", "3", "--rate", "100", "--timeout", "0.3"),
        *("--from", healed.namespace("client"), "--trace", "-w", journal, "-o", "json"),
    )
    causes = [json.loads(line)["cause"] for line in traced.stdout.splitlines()[:-1]]
    read = calitrace("drops", "-r", journal, "-o", "json", "--calico-only")
    assert read.returncode == 0, read.stderr
    *drops, summary = [json.loads(line) for line in read.stdout.splitlines()]
    assert [each["cause"] for each in drops] == causes
    assert summary["drops_seen"] == summary["shown"] + summary["harmless"] + summary["filtered"]


def test_what_comes_after_the_count_was_not_filtered(healed: Lab, tmp_path: Path) -> None:
    journal = str(tmp_path / "a.calitrace")
    assert on(healed, "fault", "policy-deny").returncode == 0
    calitrace(
        *("probe", "nodeport", "10.10.0.1:30053", "--proto", "udp", "-c", "3", "--rate", "100", "--timeout", "0.3"),
        *("--from", healed.namespace("client"), "--trace", "-w", journal, "-o", "json"),
    )
    read = calitrace("drops", "-r", journal, "-o", "json", "--calico-only", "-c", "1")
    summary = json.loads(read.stdout.splitlines()[-1])
    assert (summary["shown"], summary["unread"]) == (1, 2)
    assert summary["drops_seen"] == summary["shown"] + summary["harmless"] + summary["filtered"] + summary["unread"]
