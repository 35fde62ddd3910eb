"""``calitrace log`` as people run it, on files and pipes: every input gives an answer or one error."""

from __future__ import annotations

import gzip
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from calitrace.journal import TEXT, Writer
from calitrace.model import Link, Namespace, Role, Topology

DATA = Path(__file__).resolve().parent.parent / "data"
MASTER = DATA / "trace-master.log"
OLD = DATA / "real-calico" / "trace-v3.28.log"
COMMAND = (sys.executable, "-W", "ignore", "-c", "from calitrace.cli.main import run; run()", "log")
TIMEOUT_S = 60


def log(*words: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run ``calitrace log``."""
    return subprocess.run([*COMMAND, *words], input=given, capture_output=True, check=False, timeout=TIMEOUT_S)


def objects(output: bytes) -> list[dict[str, Any]]:
    """The JSON lines of an output."""
    return [json.loads(line) for line in output.splitlines()]


def test_stats_of_a_real_trace() -> None:
    (stats,) = objects(log("-r", str(MASTER), "--stats", "-o", "json").stdout)
    lines = MASTER.read_text().splitlines()
    assert stats["lines_total"] == len(lines)
    assert stats["lines_other"] == sum(line.startswith("#") for line in lines)
    assert (stats["lines_unknown"], stats["events_lost"]) == (0, 0)
    assert stats["lines_calico"] == stats["lines_total"] - stats["lines_other"]
    assert stats["packets"] == sum("New packet at" in line for line in lines)
    assert stats["verdicts"] == {"ALLOW": 120, "DENY": 4}
    assert stats["drops"] == {
        "the source is not in the service's source ranges": 2,
        "the backend is not in Calico's routes map": 2,
    }
    ingress = next(each for each in stats["interfaces"] if (each["interface"], each["hook"]) == ("ens192", "ingress"))
    assert ingress["packets"] == sum(row["count"] for row in ingress["histogram"])
    assert ingress["execution_ns"]["p50"] <= ingress["execution_ns"]["p99"]


@pytest.mark.parametrize("form", ["text", "gzip", "members", "stdin", "journal"])
def test_all_inputs_give_the_same(form: str, tmp_path: Path) -> None:
    raw = OLD.read_bytes()
    path = tmp_path / "input"
    expected = log("-r", str(OLD), "-o", "json").stdout
    if form == "text":
        path.write_bytes(raw)
    elif form == "gzip":
        path.write_bytes(gzip.compress(raw))
    elif form == "members":
        path.write_bytes(gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]))
    elif form == "journal":
        assert log("-r", "-", "-w", str(path), "--stats", given=raw).returncode == 0
    found = log("-r", "-", "-o", "json", given=raw) if form == "stdin" else log("-r", str(path), "-o", "json")
    assert (found.returncode, found.stdout) == (0, expected)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--verdict", "deny"], 4),
        (["--verdict", "none"], 0),
        (["--hook", "xdp"], 0),
        (["-i", "cali1a2b3c4d5e6", "--hook", "ingress"], 7),
        (["-i", "cali*", "-i", "ens224"], 37),
        (["-c", "5"], 5),
        (["host", "10.77.0.9"], 2),
        (["udp", "port", "4789", "and", "src", "host", "10.10.0.2"], 20),
        (["tcp", "and", "dst", "port", "80"], 2),
    ],
)
def test_filters(words: list[str], count: int) -> None:
    found = log("-r", str(MASTER), "-o", "json", *words)
    assert len(objects(found.stdout)) == count, found.stderr


def test_outputs_for_people() -> None:
    table = log("-r", str(MASTER), "--verdict", "deny").stdout.decode().splitlines()
    assert table[0].split() == ["TIME", "PROCESS", "INTERFACE", "VERDICT", "EXEC", "PACKET"]
    assert "5307.347709 python3-18225" in table[1]
    assert "UNAUTH_SOURCE; the source is not in the service's source ranges" in table[1]
    compact = log("-r", str(MASTER), "-o", "compact").stdout.decode().splitlines()
    assert max(map(len, compact)) <= 80
    words = log("-r", str(MASTER), "--verdict", "deny", "-c", "1", "-v").stdout.decode()
    assert "  ens192-I: into the host; tc ingress hook" in words
    assert "  DENY: the packet was dropped" in words
    assert "18928 ns in the program, with the time that writing this log took" in words
    assert "    Packet is from an unauthorised source: DROP" in words


def test_every_line_is_kept() -> None:
    mixed = b"hello\neth0------------I: what is this\n\xff\x00garbage\n" + MASTER.read_bytes()[:4000]
    shown = objects(log("-r", "-", "--all", "-o", "json", "-v", given=mixed).stdout)
    texts = [each["text"] for each in shown if each["type"] == "line"]
    assert texts[:3] == ["hello", "eth0------------I: what is this", "\udcff\x00garbage"]
    forms = [each["form"] for each in shown if each["type"] == "line"][:3]
    assert forms == ["other", "unknown", "other"]
    people = log("-r", "-", "--all", given=mixed).stdout.decode()
    assert "  other: \\udcff\\x00garbage\n" in people


@pytest.mark.parametrize(
    ("given", "total"),
    [
        (b"", 0),
        (b"\x00" * 100, 1),
        (os.urandom(100_000).replace(b"\n", b"") + b"\n", None),
        (b"x" * (1 << 20) + b"\n", 1),
        (b"x" * (1 << 22), None),
        (b"\x92\xa9calitrac", 1),
        (b"\r\n\r\n", 2),
    ],
)
def test_odd_input_is_counted(given: bytes, total: int | None) -> None:
    found = log("-r", "-", "--stats", "-o", "json", given=given)
    (stats,) = objects(found.stdout)
    assert (found.returncode, stats["packets"], stats["lines_calico"]) == (0, 0, 0)
    assert stats["lines_total"] == total or total is None
    assert stats["lines_total"] == stats["lines_other"]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("gzip", gzip.compress(b"hello\n" * 9999)[:-12], "the gzip file is cut short"),
        ("gzip", gzip.compress(os.urandom(99))[:20] + b"\xff" * 9999, "damaged gzip"),
        ("journal", b"\x92\xa9calitrace\x81\xa6schema\x63", "schema 1"),
        ("missing", None, "No such file"),
        (".", None, "Is a directory"),
    ],
)
def test_one_error(name: str, content: bytes | None, cause: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = log("-r", str(tmp_path / name))
    assert found.returncode == 2
    assert f"error: {tmp_path / name}" in found.stderr.decode() or "error: cannot read" in found.stderr.decode()
    assert cause in found.stderr.decode()
    assert b"Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["-r", str(MASTER), "--source", "bpf"], "--source is for live runs"),
        (["-r", str(MASTER), "nonsense", "words"], "syntax error"),
        (["-r", str(MASTER), "-w", str(MASTER)], "exists already"),
    ],
)
def test_options_that_cannot_be(words: list[str], cause: str) -> None:
    found = log(*words)
    assert (found.returncode, cause in found.stderr.decode()) == (2, True), found.stderr


def test_a_reader_that_goes_away() -> None:
    with subprocess.Popen([*COMMAND, "-r", str(MASTER)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert b"Traceback" not in errors
    assert process.returncode == 141


def lines_of(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines as they come; a silence of TIMEOUT_S fails the test."""
    rest = b""
    while True:
        assert select.select([stream], [], [], TIMEOUT_S)[0], "nothing came"
        chunk = os.read(stream.fileno(), 65536)
        assert chunk, "it ended"
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole


def test_a_file_that_grows_is_truncated_and_is_rotated(tmp_path: Path) -> None:
    start, end = (
        b"curl-7 [000] ..s2. 5.000001: bpf_trace_printk: eth0------------I: " + text
        for text in (b"New packet at ifindex=2; mark=0\n", b"Final result=ALLOW rc 0. Program execution time: %dns\n")
    )
    path = tmp_path / "trace"
    path.write_bytes(start)
    command = [*COMMAND, "-r", str(path), "-f", "-o", "json", "-c", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        found = lines_of(process.stdout)
        with path.open("ab") as stream:
            stream.write(end % 1)
        assert json.loads(next(found))["execution_ns"] == 1
        path.write_bytes(end % 2)  # truncated, and shorter than before
        assert json.loads(next(found))["execution_ns"] == 2
        path.rename(tmp_path / "trace.1")
        path.write_bytes(start + end % 3)
        assert json.loads(next(found))["execution_ns"] == 3
        with path.open("ab") as stream:
            stream.write(start + end % 4)
        assert json.loads(next(found))["execution_ns"] == 4
    assert process.returncode == 0


def test_pods_interfaces_of_another_cni() -> None:
    text = b"".join(
        b"curl-7 [000] ..s2. 5.000001: bpf_trace_printk: eni1234--------I: " + each + b"\n"
        for each in (b"New packet at ifindex=2; mark=0", b"DENY due to policy")
    )
    for words, hook in (((), "ingress"), (("--interface-prefix", "azv,eni"), "egress")):
        (passage,) = objects(log("-r", "-", "-o", "json", *words, given=text).stdout)
        assert (passage["interface"], passage["hook"], passage["verdict"]) == ("eni1234", hook, "DENY")
    assert log("-r", "-", "--interface-prefix", "eni,", given=text).returncode == 2


def test_pods_interfaces_by_what_a_journal_has(tmp_path: Path) -> None:
    links = {i: Link(i, name, workload=i == 2) for i, name in ((1, "ens5"), (2, "eni5a10c2e7f31"))}
    node = Namespace(7, "node", Role.NODE, links)
    path = tmp_path / "a.calitrace"
    with path.open("wb") as stream:
        writer = Writer(stream, {"topology": Topology({7: node}).to_map()})
        for name in ("eni0777--------E", "ens5-----------E"):
            text = f"curl-7 [000] ..s2. 5.000001: bpf_trace_printk: {name}: DENY due to policy\n"
            writer.write(TEXT, {"raw": text.encode()})
    found = [(each["interface"], each["hook"]) for each in objects(log("-r", str(path), "-o", "json").stdout)]
    assert found == [("eni0777", "ingress"), ("ens5", "egress")]
