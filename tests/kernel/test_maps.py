"""Real maps that the test makes and pins in a bpffs of its own, read back."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import threading
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from calitrace import journal
from calitrace.calico import maptables
from calitrace.calico.maps import RawMap
from calitrace.cli.maps import command
from calitrace.errors import EnvironmentUnfit, NotCalico, UsageError
from calitrace.kernel import maps, mounts, syscall
from tests.known_maps import KNOWN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root
HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LPM_TRIE = 1, 2, 5, 6, 9, 11
NO_PREALLOC = 1


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A bpffs of our own with Calico's directories."""
    where = tmp_path / "bpf"
    where.mkdir()
    mounts.mount_bpffs(where)
    try:
        (where / "tc" / "globals").mkdir(parents=True)
        yield where
    finally:
        assert mounts.unmount(where)


def pin(
    bpffs: Path, name: str, map_type: int, sizes: tuple[int, int], entries: int, place: str = "tc/globals"
) -> maps.Found:
    """Make and pin a map; what discovery says about it."""
    (bpffs / place).mkdir(parents=True, exist_ok=True)
    flags = NO_PREALLOC if map_type in (HASH, LPM_TRIE) else 0
    descriptor = syscall.map_create(map_type, *sizes, entries, name=name, flags=flags)
    try:
        syscall.object_pin(descriptor, bpffs / place / name)
    finally:
        os.close(descriptor)
    return next(each for each in maps.find(bpffs) if each.pin == f"{place}/{name}")


def write(found: maps.Found, entries: dict[bytes, bytes]) -> None:
    """Put entries in."""
    descriptor = maps.open_map(found)
    try:
        for key, value in entries.items():
            syscall.map_update(descriptor, key, value)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("map_type", [HASH, LRU_HASH, LPM_TRIE])
def test_entries_come_back(bpffs: Path, map_type: int) -> None:
    found = pin(bpffs, "cali_v4_routes", map_type, (8, 8), 5000)
    wanted = {struct.pack("<I4s", 32, struct.pack(">I", i)): struct.pack("<Q", i) for i in range(3001)}
    write(found, wanted)
    raw = maps.read(found)
    assert (raw.name, raw.pin, raw.key_size, raw.value_size, raw.max_entries, raw.cpus) == (
        *("cali_v4_routes", "tc/globals/cali_v4_routes", 8, 8, 5000, 1),
    )
    pairs = list(raw.entries)
    assert (len(pairs), dict(pairs)) == (len(wanted), wanted)


@pytest.mark.parametrize("map_type", [PERCPU_HASH, PERCPU_ARRAY])
def test_per_cpu_values_have_one_part_for_each_cpu(bpffs: Path, map_type: int) -> None:
    cpus = syscall.possible_cpus()
    found = pin(bpffs, "cali_counters6", map_type, (4, 24), 2)
    value = b"".join(struct.pack("<QQQ", cpu, 7, 1 << 40) for cpu in range(cpus))
    write(found, {struct.pack("<I", 1): value})
    raw = maps.read(found)
    assert raw.cpus == cpus
    assert dict(raw.entries)[struct.pack("<I", 1)] == value


def test_a_kernel_without_batches(bpffs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: syscall.Batch) -> tuple[int, bytes, bytes]:
        raise OSError(524, "not supported")

    monkeypatch.setattr(syscall.Batch, "read", refused)
    found = pin(bpffs, "cali_v4_nat_be", HASH, (8, 8), 1000)
    wanted = {struct.pack("<II", i, 0): struct.pack("<Q", i) for i in range(211)}
    write(found, wanted)
    pairs = list(maps.read(found).entries)
    assert (len(pairs), dict(pairs)) == (len(wanted), wanted)


def test_a_bucket_larger_than_the_block(bpffs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_FIRST_BLOCK", 1)
    monkeypatch.setattr(maps, "_BLOCK_BYTES", 1)
    found = pin(bpffs, "cali_v4_nat_be", HASH, (8, 8), 64)
    wanted = {struct.pack("<II", i, 0): struct.pack("<Q", i) for i in range(64)}
    write(found, wanted)
    pairs = list(maps.read(found).entries)
    assert dict(pairs) == wanted


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("map_type", [HASH, LRU_HASH, LPM_TRIE])
def test_a_map_that_changes_meanwhile(
    bpffs: Path, monkeypatch: pytest.MonkeyPatch, map_type: int, batches: bool
) -> None:
    """Half of the entries stay; the others go and come as fast as a thread can make them."""
    if not batches:
        monkeypatch.setattr(maps, "_NO_BATCH", {0})
        monkeypatch.setattr(syscall.Batch, "read", _unsupported)
    count = 100_000 if map_type != LPM_TRIE and batches else 10_000
    found = pin(bpffs, "cali_v4_routes", map_type, (8, 8), 2 * count)
    keys = [struct.pack("<I4s", 32, struct.pack(">I", i)) for i in range(count)]
    descriptor = maps.open_map(found)
    for start in range(0, count, 5000):
        part = keys[start : start + 5000]
        syscall.map_update_batch(descriptor, len(part), b"".join(part), bytes(8) * len(part))
    stop, turns = threading.Event(), [0]

    def change() -> None:
        for index in itertools.cycle(range(1, count, 2)):
            if stop.is_set():
                break
            syscall.map_delete(descriptor, keys[index])
            syscall.map_update(descriptor, keys[index], bytes(8))
            turns[0] += 1

    changer = threading.Thread(target=change)
    changer.start()
    try:
        raw = maps.read(found)
        seen = [key for key, _ in raw.entries]
    finally:
        stop.set()
        changer.join()
        os.close(descriptor)
    assert turns[0] > 0
    assert len(seen) == len(set(seen))
    assert isinstance(raw.entries, maps.Entries)
    assert set(seen) >= set(keys[0::2]) or not raw.entries.complete


def _unsupported(self: syscall.Batch) -> tuple[int, bytes, bytes]:
    raise OSError(0, "not supported")


def test_keys_that_come_again_for_ever_end(bpffs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel starts again at the first key when the one at the cursor has gone."""
    found = pin(bpffs, "cali_v4_routes", LPM_TRIE, (8, 8), 10)
    write(found, {struct.pack("<I4s", 32, bytes(4)): bytes(8)})
    monkeypatch.setattr(syscall.Batch, "read", lambda self: (1, struct.pack("<I4s", 32, bytes(4)), bytes(8)))
    raw = maps.read(found)
    assert len(list(raw.entries)) == 1
    assert isinstance(raw.entries, maps.Entries)
    assert not raw.entries.complete
    assert raw.entries.notes == [
        "entries vanished faster than they could be read: some may be missing",
        "20 entries came twice because the map changed while it was read; shown once",
    ]


def test_a_map_that_has_gone(bpffs: Path) -> None:
    found = pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 10)
    raw = maps.read(found)
    (bpffs / found.pin).unlink()
    with pytest.raises(EnvironmentUnfit, match="map tc/globals/cali_v4_ct4 has gone"):
        list(raw.entries)


@pytest.mark.parametrize("words", [("dump",), ("dump", "-j"), ("summary",), ("get", "1")])
def test_a_map_that_goes_while_it_is_read_is_one_error(
    bpffs: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    found = pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 10)
    write(found, connections(3))
    read = maps.read

    def read_and_go(each: maps.Found) -> RawMap:
        (bpffs / found.pin).unlink(missing_ok=True)
        return read(each)

    monkeypatch.setattr(maps, "read", read_and_go)
    with pytest.raises(EnvironmentUnfit, match="cali_v4_ct4 has gone") as gone:
        command.main(["conntrack", *words, "--bpffs", str(bpffs)], standalone_mode=False)
    assert gone.value.hint


def test_values_that_are_nonsense(bpffs: Path) -> None:
    """Counts and prefix lengths that no Felix writes end neither in a traceback nor never."""
    front = pin(bpffs, "cali_v4_nat_fe3", HASH, (16, 20), 10)
    key = struct.pack("<I4sHB4sx", 56 + 77, bytes([10, 0, 0, 1]), 80, 6, bytes([10, 0, 0, 0]))
    write(front, {struct.pack("<I4sHB5x", 56, bytes([10, 0, 0, 1]), 80, 6): struct.pack("<5I", 1, 0xFFFFFFF0, 9, 0, 0),
                  key: struct.pack("<5I", 2, 1, 0, 0, 0)})  # fmt: skip
    write(pin(bpffs, "cali_v4_nat_be", HASH, (8, 8), 10), {bytes(8): bytes(8)})
    write(pin(bpffs, "cali_v4_routes", HASH, (8, 8), 10), {struct.pack("<I4s", 99, bytes(4)): b"\xff" * 8})
    write(pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 10), {b"\xff" * 16: b"\xff" * 88, bytes(16): bytes(88)})
    where = ("--bpffs", str(bpffs))
    dump = calitrace("nat", "dump", *where)
    assert "... and 4294957280 more: is that count right?" in dump.stdout
    assert "type-255" in calitrace("conntrack", "dump", "-j", *where).stdout
    walked = calitrace("walk", "10.0.0.9:1", "10.0.0.1:80/tcp", *where)
    assert walked.returncode == 1
    assert "1:0 and 9999 others: missing" in walked.stdout
    for words in (("conntrack", "dump"), ("conntrack", "get", "65535"), ("routes", "dump"), ("diff", "--wait", "0.1")):
        done = calitrace(*words, *where)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_calico_s_own_names_of_commands(bpffs: Path) -> None:
    where = ("--bpffs", str(bpffs))
    write(pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 10), connections(3))
    service, backend = bytes([10, 0, 0, 1]), struct.pack("<4sHxx", bytes([10, 65, 0, 2]), 8080)
    sticky = {struct.pack("<4sHBx4s4x", service, 80, 6, bytes([10, 0, 0, 9])): backend + struct.pack("<Q", 5)}
    write(pin(bpffs, "cali_v4_nat_aff", LRU_HASH, (16, 16), 10), sticky)
    write(pin(bpffs, "cali_v4_mglv2", HASH, (8, 8), 10), {struct.pack("<II", 1, 9): backend})
    profile = struct.pack("<QQ", 100, 4) + bytes(16 * (syscall.possible_cpus() - 1))
    write(pin(bpffs, "cali_profiling2", PERCPU_HASH, (8, 16), 10), {struct.pack("<II", 3, 0): profile})
    for words, line in (
        (("conntrack", "stats"), "TCP Syn-sent: 3"),
        (("nat", "aff"), "client 10.0.0.9 svc proto 6 10.0.0.1:80 -> 10.65.0.2:8080 ts 5ns"),
        (("nat", "maglev"), "svc 1 ordinal 9 -> 10.65.0.2:8080"),
        (("affinity", "get", "10.65.0.2:8080"), "client 10.0.0.9 svc proto 6 10.0.0.1:80 -> 10.65.0.2:8080 ts 5ns"),
    ):
        assert calitrace(*words, *where).stdout.splitlines()[-1] == line
    latency = calitrace("profiling", "e2e", *where).stdout.splitlines()
    assert "25.000 ns" in latency[3]
    assert json.loads(calitrace("conntrack", "stats", "-j", *where).stdout)["entries"] == 3
    assert json.loads(calitrace("profiling", "e2e", "-j", *where).stdout)["samples"] == 4


def test_a_service_by_one_of_its_frontends(bpffs: Path) -> None:
    where = ("--bpffs", str(bpffs))
    front = struct.pack("<I16sHB17x", 152, IPv6Address("fd96::1").packed, 80, 6)
    write(pin(bpffs, "cali_v6_nat_fe3", LPM_TRIE, (40, 20), 10), {front: struct.pack("<5I", 9, 0, 0, 0, 0)})
    six = "fd96::1 port 80 proto 6 id 9 count 0 local 0\n"
    for asked in ("dump fd96::1 80 tcp", "get fd96::1", "get [fd96::1]:80", "dump -6"):
        assert calitrace("nat", *asked.split(), *where).stdout == six
    cluster, node = bytes([10, 96, 0, 1]), bytes([10, 10, 0, 1])
    keys = {(a, p, s): struct.pack("<I4sHB5x", 56, a, p, 6) for a, p, s in ((cluster, 80, 7), (node, 30080, 7),
                                                                             (cluster, 7, 8))}  # fmt: skip
    write(pin(bpffs, "cali_v4_nat_fe3", LPM_TRIE, (16, 20), 10),
          {key: struct.pack("<5I", service, 2, 0, 0, 0) for (_, _, service), key in keys.items()})  # fmt: skip
    write(pin(bpffs, "cali_v4_nat_be", HASH, (8, 8), 10),
          {struct.pack("<II", 7, 0): struct.pack("<4sHxx", bytes([10, 65, 0, 2]), 8080)})  # fmt: skip
    backends = ["\t7:0\t 10.65.0.2:8080", "\t7:1\t is missing"]
    fronts = {"10.10.0.1 port 30080 proto 6 id 7 count 2 local 0", "10.96.0.1 port 80 proto 6 id 7 count 2 local 0"}
    for proto in ("tcp", "TCP", "6"):
        lines = calitrace("nat", "dump", "10.96.0.1", "80", proto, *where).stdout.splitlines()
        assert (set(lines[::3]), lines[1:3], lines[4:6]) == (fronts, backends, backends)
    grouped = calitrace("nat", "dump", "10.10.0.1", "30080", "tcp", "--group-by-service", *where).stdout.splitlines()
    assert (set(grouped[:2]), grouped[2:]) == (fronts, backends)
    (group,) = calitrace(
        "nat", "dump", "10.10.0.1", "30080", "tcp", "--group-by-service", "-j", *where
    ).stdout.splitlines()
    assert json.loads(group)["backends"] == [{"addr": "10.65.0.2", "port": 8080}, None]
    rows = map(json.loads, calitrace("nat", "dump", "-j", *where).stdout.splitlines())
    assert {row["id"]: row["backends"] for row in rows if "backends" in row}[8] == [None, None]
    for key in ("10.96.0.1:80", "10.65.0.2"):
        lines = calitrace("nat", "get", key, *where).stdout.splitlines()
        assert lines[-2:] == backends
        assert set(lines[::3]) == ({"10.96.0.1 port 80 proto 6 id 7 count 2 local 0"} if ":" in key else fronts)
    rows = map(json.loads, calitrace("nat", "get", "10.96.0.1", "7", "-j", *where).stdout.splitlines())
    assert sorted(row["id"] for row in rows) == [7, 7, 8]  # of service 7 a frontend and the backend
    assert calitrace("nat", "get", "10.65.0.3", *where).returncode == 1
    for words in (("10.96.0.1", "80"), ("10.96.0.1", "81", "tcp"), ("10.96.0.1", "x", "tcp"), ("x", "80", "tcp"),
                  ("10.96.0.1", "80", "what")):  # fmt: skip
        done = calitrace("nat", "dump", *words, *where)
        assert (done.returncode, done.stdout, done.stderr[:7]) == (2, "", "error: ")


def test_names_and_numbers_that_look_like_addresses(bpffs: Path) -> None:
    where = ("--bpffs", str(bpffs))
    write(pin(bpffs, "cali_iface4", HASH, (4, 52), 10),
          {struct.pack("<I", n): struct.pack("<I16s32x", 8, name)
           for n, name in ((4, b"vxlan.calico"), (5, b"bond0.10"))})  # fmt: skip
    rules = pin(bpffs, "cali_rule_ctrs2", PERCPU_HASH, (8, 8), 10)
    write(rules, {struct.pack("<Q", 0x99AABBCC): struct.pack("<Q", 1) + bytes(8 * (syscall.possible_cpus() - 1))})
    for words in (("ifstate", "get", "vxlan.calico"), ("ifstate", "get", "bond0.10"), ("policy", "get", "0x99aabbcc")):
        assert len(calitrace(*words, *where).stdout.splitlines()) == 1
    assert calitrace("policy", "get", "0xzz", *where).returncode == 1


def test_policy_files_are_read_where_rules_are_named(bpffs: Path, tmp_path: Path) -> None:
    write(
        pin(bpffs, "cali_rule_ctrs2", PERCPU_HASH, (8, 8), 10),
        {struct.pack("<Q", 7): bytes(8 * syscall.possible_cpus())},
    )
    pin(bpffs, "cali_v4_routes", LPM_TRIE, (8, 8), 10)
    comments = ["Start of policy default.p", 'Start of rule action:"deny"', "Rule MatchID: 7"]
    (tmp_path / "cali1_ingress_v4.json").write_text(json.dumps({"policyInfo": [{"comments": comments}]}))
    (tmp_path / "broken.json").write_text("{")
    where = ("--bpffs", str(bpffs), "--policy-dir", str(tmp_path))
    assert calitrace("routes", "dump", *where).stderr == ""
    named = calitrace("policy", "dump", *where)
    assert named.stdout == "0x0000000000000007           0  default.p rule 0 (deny)\n"
    assert "no rule names from broken.json" in named.stderr
    file = str(tmp_path / "a.calitrace")
    assert calitrace("snapshot", "-w", file, *where).returncode == 0
    assert calitrace("policy", "dump", "-r", file).stdout == named.stdout


def test_counters_of_an_interface_that_has_none(bpffs: Path) -> None:
    zero = bytes(216 * syscall.possible_cpus())
    write(pin(bpffs, "cali_counters6", PERCPU_HASH, (8, 216), 10), {struct.pack("<II", 2, 0): zero})
    write(pin(bpffs, "cali_iface4", HASH, (4, 52), 10), {struct.pack("<I", 2): struct.pack("<I16s32x", 8, b"eth9")})
    where = ("--bpffs", str(bpffs))
    assert calitrace("counters", "dump", "--iface=eth9", *where).stdout.endswith("dumped eth9 counters.\n\n")
    done = calitrace("counters", "dump", "--iface=eth8", *where)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no counters of eth8\nhint: there are those of eth9\n"


def test_neighbours_are_removed_as_calico_does(bpffs: Path) -> None:
    neighbours = pin(bpffs, "cali_v4_arp2", LRU_HASH, (8, 12), 10)
    write(neighbours, {struct.pack("<4sI", bytes([10, 10, 0, 2]), 2): bytes(12)})
    where = ("--bpffs", str(bpffs))
    shown = calitrace("arp", "clean", "--dry-run", *where)
    assert shown.stdout == "dev    2:       10.10.0.2 : 00:00:00:00:00:00 -> 00:00:00:00:00:00\n"
    assert (calitrace("arp", "clean", *where).returncode, len(list(maps.read(neighbours).entries))) == (2, 1)
    assert calitrace("arp", "clean", "--allow-system-changes", *where).returncode == 0
    assert list(maps.read(neighbours).entries) == []


def test_maps_that_only_other_commands_used(bpffs: Path) -> None:
    where = ("--bpffs", str(bpffs))
    queued = struct.pack("<I", 6) + struct.pack("<I4s4sHH", 6, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 80, 9)[4:]
    write(pin(bpffs, "cali_v4_ccq2", HASH, (16, 32), 10), {queued: queued + struct.pack("<QQ", 5, 6)})
    write(pin(bpffs, "cali_v6_ct_nats", LRU_HASH, (32, 20), 10),
          {struct.pack("<Q16s2s2xB3x", 5, IPv6Address("fd65::2").packed, b"\x1f\x90", 6):
           IPv6Address("fd96::1").packed + b"\0\x50\0\0"})  # fmt: skip
    write(pin(bpffs, "cali_v4_sprefix", LPM_TRIE, (12, 4), 10),
          {struct.pack("<II4s", 56, 3, bytes([10, 1, 2, 0])): bytes(4)})  # fmt: skip
    (row,) = map(json.loads, calitrace("cleanup-queue", "dump", "-j", *where).stdout.splitlines())
    assert (row["addr_a"], row["rev_port_b"], row["rev_last_seen_ns"]) == ("10.0.0.1", 9, 6)
    assert calitrace("connect-time", "dump", "-6", *where).stdout == (
        "cookie 5  addr fd65::2  port 8080  proto tcp  orig_dst fd96::1  orig_dport 80\n"
    )
    assert calitrace("spoofing", "dump", *where).stdout == "ifindex 3  interface ifindex 3  cidr 10.1.2.0/24\n"


@pytest.mark.parametrize("name", sorted({(each.name, len(each.value)) for each in KNOWN}), ids=str)
def test_known_bytes_of_every_version_in_pinned_maps(bpffs: Path, name: tuple[str, int]) -> None:
    entries = [each for each in KNOWN if (each.name, len(each.value)) == name]
    first = entries[0]
    found = pin(bpffs, first.name, first.map_type, (len(first.key), len(first.value)), 10)
    spare = bytes(len(first.value) * (syscall.possible_cpus() - 1)) if first.map_type == PERCPU_HASH else b""
    write(found, {each.key: each.value + spare for each in entries})
    words = [first.subject, "dump", "--bpffs", str(bpffs), *(["-6"] if first.ipv6 else [])]
    done = CliRunner().invoke(command, [*words, "-j"], standalone_mode=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.exception, len(rows)) == (None, len(entries))
    for each in entries:
        assert any({name: row.get(name) for name in each.meaning} == each.meaning for row in rows), each
    text = CliRunner().invoke(command, words, standalone_mode=False)
    assert text.exception is None
    assert text.stdout or first.name.endswith("nat_be")  # backends are shown with their frontends


def test_walk_over_ipv6_maps(bpffs: Path) -> None:
    """A NodePort, its remote and its local backend, a connection, and each of its breakages."""
    node, pod, remote, client = (IPv6Address(each).packed for each in ("fd00::1", "fd65::2", "fd65:1::2", "fd99::9"))
    front = struct.pack("<I16sHB17x", 152, node, 30080, 6)
    write(pin(bpffs, "cali_v6_nat_fe3", LPM_TRIE, (40, 20), 10), {front: struct.pack("<5I", 1, 2, 1, 0, 0)})
    backends = pin(bpffs, "cali_v6_nat_be", HASH, (8, 20), 10)
    write(backends, {struct.pack("<II", 1, n): struct.pack("<16sHxx", a, 8080) for n, a in enumerate((pod, remote))})
    routes = pin(bpffs, "cali_v6_routes", LPM_TRIE, (20, 20), 10)
    write(routes, {
        struct.pack("<I16s", 128, node): struct.pack("<I16x", 0x18),
        struct.pack("<I16s", 128, pod): struct.pack("<II12x", 0xC, 3),
        struct.pack("<I16s", 64, remote[:8] + bytes(8)): struct.pack("<I16s", 4, IPv6Address("fd00::2").packed),
    })  # fmt: skip
    state = pin(bpffs, "cali_iface4", HASH, (4, 52), 10)
    write(state, {struct.pack("<I", 3): struct.pack("<I16s32x", 5, b"cali6")})
    tracked = pin(bpffs, "cali_v6_ct4", LRU_HASH, (40, 128), 10)
    where = ("--bpffs", str(bpffs))

    def verdict(source: str = "fd99::9") -> str:
        done = calitrace("walk", source, "[fd00::1]:30080/tcp", "-o", "json", *where)
        assert done.stdout, done.stderr
        return str(json.loads(done.stdout.splitlines()[-1])["found"])

    assert verdict() == (
        "1 of 2 new connections: delivered to [fd65::2]:8080 by cali6; 1 of 2 new connections: "
        "forwarded in Calico's VXLAN to node fd00::2, for [fd65:1::2]:8080"
    )
    forward = struct.pack("<I16s16sHH", 6, node, client, 30080, 4000)
    reverse = struct.pack("<I16s16sHH", 6, pod, client, 8080, 4000)
    write(tracked, {forward: struct.pack("<16xB7x40sH62x", 1, reverse, 0)})
    assert verdict("[fd99::9]:4000").endswith("(stale conntrack)")
    write(tracked, {reverse: struct.pack("<16xB6xB48x16s16sHH20x", 2, 1, bytes(16), node, 30080, 0)})
    assert verdict("[fd99::9]:4000") == "delivered to [fd65::2]:8080 by cali6"
    got = calitrace("conntrack", "get", "fd65::2", "-6", "-j", *where).stdout.splitlines()
    pairs = [(each["type"], [other["type"] for other in each["pair"]]) for each in map(json.loads, got)]
    assert pairs == [("nat-rev", ["nat-fwd"]), ("nat-fwd", ["nat-rev"])]
    for each, key, broken in (
        (state, struct.pack("<I", 3), "no ifstate"),
        (routes, struct.pack("<I16s", 128, pod), "no route"),
        (backends, struct.pack("<II", 1, 0), "frontend without backend"),
    ):
        assert maps.delete(each, [key]) == 1
        assert f"({broken})" in verdict()


def test_maps_of_each_interface_are_one_node(bpffs: Path) -> None:
    for place in ("tc/eth0_igr", "tc/eth0_egr", "tc/cali1_igr"):
        pin(bpffs, "cali_counters", PERCPU_ARRAY, (4, 112), 1, place)
    assert [each.directory for each in maps.find(bpffs)] == ["tc/cali1_igr", "tc/eth0_egr", "tc/eth0_igr"]


def test_programs_and_others_are_not_maps(bpffs: Path) -> None:
    found = pin(bpffs, "cali_v4_arp2", LRU_HASH, (8, 12), 10)
    descriptor = syscall.map_create(ARRAY, 4, 4, 1, name="other_map")
    syscall.object_pin(descriptor, bpffs / "tc" / "globals" / "other_map")
    os.close(descriptor)
    assert maps.find(bpffs) == [found]


def test_two_nodes_are_refused(bpffs: Path) -> None:
    (bpffs / "tc" / "globals").rmdir()
    (bpffs / "tc").rmdir()
    pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 10, "lab/node-a")
    (bpffs / "lab" / "node-b").mkdir()
    descriptor = syscall.map_create(LRU_HASH, 16, 88, 10, name="cali_v4_ct4")
    syscall.object_pin(descriptor, bpffs / "lab" / "node-b" / "cali_v4_ct4")
    os.close(descriptor)
    with pytest.raises(UsageError, match="2 nodes") as wrong:
        maps.find(bpffs)
    assert f"--bpffs {bpffs}/lab/node-a" in wrong.value.hint
    assert [each.pin for each in maps.find(bpffs / "lab" / "node-a")] == ["cali_v4_ct4"]


def test_no_maps_is_not_calico(bpffs: Path) -> None:
    with pytest.raises(NotCalico, match="no Calico maps below"):
        maps.find(bpffs)


def test_no_such_process() -> None:
    with pytest.raises(UsageError, match="no process 999999999"):
        maps.root(None, "", 999999999)


def calitrace(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a maps command to its end."""
    command = (sys.executable, "-c", "from calitrace.cli.main import run; run()", "maps", *words)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def connections(count: int) -> dict[bytes, bytes]:
    """Conntrack entries of v4, IPv4."""
    return {struct.pack("<IIIHH", 6, i, 9, i & 0xFFFF, 80): struct.pack("<QQ72x", 0, i) for i in range(count)}


@pytest.mark.parametrize("layout", maptables.layouts(), ids=lambda e: f"{e.base}-{e.version}-{e.value.size}")
def test_every_version_live_and_from_a_snapshot(bpffs: Path, tmp_path: Path, layout: maptables.Layout) -> None:
    """Known bytes of every layout, in a real map of its sizes."""
    name = layout.base + (str(layout.version) if layout.version > 1 else "")
    found = pin(bpffs, name, HASH, (layout.key.size, layout.value.size), 10)
    key = bytes(index + 1 for index in range(layout.key.size))
    value = bytes((index * 7) & 0xFF for index in range(layout.value.size))
    write(found, {key: value})
    raw = maps.read(found)
    (live,) = maptables.iter_entries(raw, maptables.resolve(raw))
    assert live == layout.decode(key, value)
    stream = io.BytesIO()
    writer = journal.Writer(stream, {})
    for body in journal.map_bodies(raw, maptables.blocks(raw)):
        writer.write(journal.MAPS, body)
    stream.seek(0)
    (stored,) = journal.read(stream).maps
    assert list(maptables.iter_entries(stored, maptables.resolve(stored))) == [live]


def test_bad_input_has_one_error_and_its_status(bpffs: Path, tmp_path: Path) -> None:
    assert calitrace("nat", "dump", "--bpffs", str(bpffs)).returncode == 4
    pin(bpffs, "cali_v4_ct9", LRU_HASH, (16, 92), 10)
    refused = calitrace("conntrack", "dump", "--bpffs", str(bpffs))
    assert refused.returncode == 3
    assert "v9 16+92" in refused.stderr
    assert "v4 16+88" in refused.stderr
    for words in (("walk", "1.2.3", "10.0.0.1:80/tcp"), ("walk", "1.2.3.4", "10.0.0.1:80"),
                  ("walk", "::1", "1.1.1.1:1/tcp"),
                  ("walk", "1.2.3.4", "10.0.0.1:99999/tcp"), ("conntrack", "get", "10.0.0.999"), ("diff", "one"),
                  ("conntrack", "dump", "-r", "/nonexistent"), ("conntrack", "clean"),
                  ("conntrack", "remove", "what", "1.1.1.1", "2.2.2.2", "--dry-run")):  # fmt: skip
        done = calitrace(*words, "--bpffs", str(bpffs))
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_a_snapshot_cut_short_is_shown_and_then_told(bpffs: Path, tmp_path: Path) -> None:
    write(pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 1000), connections(100))
    whole, cut, garbage = (tmp_path / name for name in ("whole", "cut", "garbage"))
    assert calitrace("snapshot", "-w", str(whole), "--bpffs", str(bpffs)).returncode == 0
    raw = whole.read_bytes()
    cut.write_bytes(raw[:-5])
    garbage.write_bytes(raw + b"\xc1")
    for file in (cut, garbage):
        done = calitrace("conntrack", "dump", "-r", str(file))
        assert len(done.stdout.splitlines()) == 100
        assert done.returncode == 2
        assert "error: the snapshot is incomplete" in done.stderr


def test_half_a_snapshot_is_not_walked_nor_compared(bpffs: Path, tmp_path: Path) -> None:
    for name, kind, sizes in (("cali_v4_nat_fe3", LPM_TRIE, (16, 20)), ("cali_v4_nat_be", HASH, (8, 8)),
                              ("cali_v4_routes", LPM_TRIE, (8, 8)), ("cali_v4_ct4", LRU_HASH, (16, 88))):  # fmt: skip
        pin(bpffs, name, kind, sizes, 10)
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    assert calitrace("snapshot", "-w", whole, "--bpffs", str(bpffs)).returncode == 0
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-5])
    walked = ("walk", "10.0.0.9", "10.0.0.1:80/tcp", "-r")
    assert calitrace(*walked, whole).returncode == 1
    for words in ((*walked, cut), ("diff", whole, cut)):
        done = calitrace(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "error: the snapshot is incomplete" in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [{"interfaces": {"x": 1}}, {"programs": {"cali_jump": 1}}, {"mono_ns": "now"}, {"sysctls": [1]}, {"rules": 7},
     {"layouts": {"tc/globals/cali_v4_ct4": {"key": "1"}}}, {"in_use": 1}],
    ids=str,
)  # fmt: skip
def test_a_broken_header_is_one_error(tmp_path: Path, wrong: dict[str, object]) -> None:
    raw = RawMap("cali_v4_ct4", "tc/globals/cali_v4_ct4", 1, 16, 88, 1, 1, [])
    with (tmp_path / "a").open("wb") as stream:
        writer = journal.Writer(stream, wrong)
        for body in journal.map_bodies(raw, []):
            writer.write(journal.MAPS, body)
        writer.write(journal.END, {})
    done = calitrace("conntrack", "dump", "-r", str(tmp_path / "a"))
    assert (done.returncode, done.stderr.partition(": ")[0]) == (2, "error")
    assert "its header is broken" in done.stderr


def test_walk_wants_the_maps_of_its_family(bpffs: Path, tmp_path: Path) -> None:
    pin(bpffs, "cali_v4_nat_fe3", LPM_TRIE, (16, 20), 10)
    lost = calitrace("walk", "fd00::9", "[fd00::1]:80/tcp", "--bpffs", str(bpffs))
    assert (lost.returncode, "Calico does not handle IPv6 here" in lost.stderr) == (4, True)
    (tmp_path / "one").write_text("[]")
    half = calitrace("walk", "10.0.0.9", "10.0.0.1:80/tcp", "--bpffs", str(bpffs))
    assert (half.returncode, "no cali_v4_nat_be, cali_v4_routes map" in half.stderr) == (4, True)
    one = ("--bpftool", str(tmp_path / "one"), "--map", "cali_v4_ct4")
    done = calitrace("walk", "10.0.0.9:1", "10.0.0.1:80/tcp", *one)
    assert (done.returncode, "walk needs cali_v4_nat_fe, cali_v4_nat_be" in done.stderr) == (2, True)
    assert calitrace("diff", "--wait", "0.1", *one).returncode == 2


def test_a_closed_pipe_is_no_error(bpffs: Path) -> None:
    write(pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 50_000), connections(20_000))
    for output in ("json", "table"):
        command = (sys.executable, "-c", "from calitrace.cli.main import run; run()", "maps", "conntrack", "dump")
        with subprocess.Popen(
            (*command, "-o", output, "--bpffs", str(bpffs)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            assert running.stdout.readline()
            running.stdout.close()
            assert running.stderr.read() == b""


def test_several_versions_side_by_side(bpffs: Path) -> None:
    write(pin(bpffs, "cali_v4_ct3", HASH, (16, 88), 10), connections(1))
    write(pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 10), connections(2))
    done = calitrace("conntrack", "dump", "--bpffs", str(bpffs))
    assert len(done.stdout.splitlines()) == 2
    assert "mid-upgrade" in done.stderr
    rows = calitrace("versions", "get", "cali_v4_ct", "--bpffs", str(bpffs)).stdout.splitlines()
    assert [row.split()[:3] for row in rows] == [["cali_v4_ct3", "v3", "16+88"], ["cali_v4_ct4", "v4", "16+88"]]
    assert len(calitrace("versions", "get", "cali_v4_ct3", "--bpffs", str(bpffs)).stdout.splitlines()) == 1
    assert calitrace("versions", "get", "cali_v4_arp", "--bpffs", str(bpffs)).returncode == 1
    assert calitrace("versions", "summary", "--bpffs", str(bpffs)).stdout.splitlines() == [
        *("maps:          2", "in use:        0", "unknown:       none", "side by side:  cali_v4_ct3, cali_v4_ct4"),
    ]
    summary = json.loads(calitrace("versions", "summary", "-j", "--bpffs", str(bpffs)).stdout)
    assert summary["side_by_side"] == ["cali_v4_ct3", "cali_v4_ct4"]
    lost = calitrace("ifstate", "dump", "--bpffs", str(bpffs))
    assert (lost.returncode, "no ifstate map (cali_iface)" in lost.stderr) == (4, True)
    chosen = calitrace("conntrack", "dump", "--ver", "3", "--bpffs", str(bpffs))
    assert len(chosen.stdout.splitlines()) == 1


def test_changes_only_with_permission(bpffs: Path) -> None:
    write(pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 10), connections(3))
    counters = pin(bpffs, "cali_counters6", PERCPU_HASH, (8, 216), 10)
    key = struct.pack("<II", 1, 0)
    write(counters, {key: b"\1" * 216 * syscall.possible_cpus()})
    interfaces = pin(bpffs, "cali_iface4", HASH, (4, 52), 10)
    write(interfaces, {struct.pack("<I", 1): struct.pack("<I16s32x", 1, b"cali7")})
    for words in (("conntrack", "clean"), ("counters", "flush", "--iface", "cali7")):
        assert calitrace(*words, "--bpffs", str(bpffs), "--dry-run").returncode == 0
        assert calitrace(*words, "--bpffs", str(bpffs)).returncode == 2
    assert dict(maps.read(counters).entries)[key] == b"\1" * 216 * syscall.possible_cpus()
    for words in (("conntrack", "clean"), ("counters", "flush", "--iface", "cali7")):
        assert calitrace(*words, "--bpffs", str(bpffs), "--allow-system-changes").returncode == 0
    assert dict(maps.read(counters).entries)[key] == bytes(216 * syscall.possible_cpus())
    assert calitrace("conntrack", "dump", "--bpffs", str(bpffs)).stdout == ""


def test_a_dry_run_shows_what_goes_and_a_journal_keeps_it(bpffs: Path, tmp_path: Path) -> None:
    write(pin(bpffs, "cali_v4_ct4", LRU_HASH, (16, 88), 10), connections(3))
    write(pin(bpffs, "cali_v6_ct4", LRU_HASH, (40, 128), 10), {bytes(39) + b"\1": bytes(128)})
    counters = pin(bpffs, "cali_counters6", PERCPU_HASH, (8, 216), 10)
    write(counters, {struct.pack("<II", 1, hook): b"\1" * 216 * syscall.possible_cpus() for hook in (0, 1)})
    where = ("--bpffs", str(bpffs))
    assert len(calitrace("conntrack", "clean", "--dry-run", *where).stdout.splitlines()) == 3
    assert len(calitrace("conntrack", "clean", "--dry-run", "-6", *where).stdout.splitlines()) == 1
    none = calitrace("conntrack", "clean", "--dry-run", "--ver", "3", *where)
    assert (none.returncode, none.stdout) == (4, "")
    shown = calitrace("counters", "flush", "--dry-run", *where).stdout.splitlines()
    assert sorted(line.partition(": ")[0].split(" ", 2)[-1] for line in shown)[0].endswith("egress")
    assert all("dropped by policy " in line for line in shown)
    for words in (("conntrack", "clean"), ("counters", "flush")):
        file = str(tmp_path / words[0])
        dump = (words[0], "dump", "-j")
        before = calitrace(*dump, *where)
        assert calitrace(*words, "--dry-run", "-w", file, *where).returncode == 2
        done = calitrace(*words, "--allow-system-changes", "-w", file, *where)
        assert done.returncode == 0, done.stderr
        kept = calitrace(*dump, "-r", file)
        strip = [{k: v for k, v in json.loads(line).items() if k not in ("age_ns", "interface", "ab", "ba")}
                 for text in (before.stdout, kept.stdout) for line in sorted(text.splitlines())]  # fmt: skip
        half = len(strip) // 2
        assert half == {"conntrack": 3, "counters": 2}[words[0]]
        assert strip[:half] == strip[half:]
        write(counters, {struct.pack("<II", 1, 0): b"\1" * 216 * syscall.possible_cpus()})
        again = calitrace(*words, "--allow-system-changes", "-w", file, *where)
        assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert dict(maps.read(counters).entries)[struct.pack("<II", 1, 0)] == b"\1" * 216 * syscall.possible_cpus()
