"""Probes across real namespaces: every outcome, and nothing half-open behind them."""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute

from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import netns
from calitrace.model import Outcome
from calitrace.packet import TCP, UDP
from calitrace.probes import results
from calitrace.probes.run import ProbeRun, Settings
from calitrace.probes.template import checksum
from tests.kernel.conftest import compile_tc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calitrace.model import Probe
    from tests.kernel.conftest import Pair

pytestmark = pytest.mark.root
PROGRAM = str(Path(sys.executable).parent / "calitrace")


@contextmanager
def servers(pair: Pair) -> Iterator[None]:
    """A TCP listener on 8080 that accepts nothing, and a UDP echo on 5353, at the right side."""
    stop_read, stop_write = socket.socketpair()
    with (
        netns.inside(pair.right),
        socket.create_server((pair.right_ip, 8080), backlog=4096),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo,
    ):
        echo.bind((pair.right_ip, 5353))

        def serve() -> None:
            while stop_read not in (ready := select.select([echo, stop_read], [], [])[0]):
                for each in ready:
                    data, peer = each.recvfrom(65535)
                    each.sendto(data, peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop_write.close()
            thread.join()
            stop_read.close()


def outcomes(settings: Settings) -> list[Outcome]:
    """What became of each probe."""
    with ProbeRun(settings) as run:
        return [probe.outcome for probe in run.run()]


def half_open(pair: Pair) -> list[str]:
    """Connections in state SYN_RECV (03) at the right side."""
    with netns.inside(pair.right):
        lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    return [line for line in lines if line.split()[3] == "03"]


@pytest.mark.parametrize(
    ("proto", "port", "expected"),
    [
        (TCP, 8080, Outcome.ANSWERED),
        (TCP, 81, Outcome.REFUSED),
        (UDP, 5353, Outcome.ANSWERED),
        (UDP, 81, Outcome.REFUSED),
    ],
)
@pytest.mark.parametrize("size", [0, 1400])
def test_outcomes(pair: Pair, proto: int, port: int, expected: Outcome, size: int) -> None:
    with servers(pair):
        found = outcomes(Settings(pair.right_ip, port, proto, count=5, rate=500, size=size, namespace=pair.left))
        assert found == [expected] * 5
        assert half_open(pair) == []


def test_a_reply_that_is_lost_leaves_nothing_half_open(pair: Pair) -> None:
    drop_replies = compile_tc(
        "int cali_lose(struct __sk_buff *skb) { return skb->protocol == bpf_htons(0x0800) ? 2 : 0; }"
    )
    pair.attach(drop_replies, "cali_lose", pair.left, "left0", "ingress")
    with servers(pair):
        found = outcomes(Settings(pair.right_ip, 8080, TCP, count=5, rate=500, namespace=pair.left, timeout_s=0.2))
        assert found == [Outcome.UNANSWERED] * 5
        assert half_open(pair) == []


@pytest.mark.parametrize(("proto", "port"), [(TCP, 8080), (UDP, 5353)])
def test_many_probes_at_the_top_rate(pair: Pair, proto: int, port: int) -> None:
    with (
        servers(pair),
        ProbeRun(Settings(pair.right_ip, port, proto, count=1000, rate=1000, namespace=pair.left)) as run,
    ):
        probes = run.run()
        assert [probe.number for probe in probes] == list(range(1000))
        assert [probe.outcome for probe in probes] == [Outcome.ANSWERED] * 1000
        assert run.own_losses() == 0
        assert half_open(pair) == []


def test_unreachable_target_is_one_clear_error(pair: Pair) -> None:
    with pytest.raises(EnvironmentUnfit) as caught:
        ProbeRun(Settings("203.0.113.1", 80, TCP, namespace=pair.left)).__enter__()
    assert "cannot reach 203.0.113.1" in caught.value.cause
    with pytest.raises(UsageError, match="no network namespace 'ct-none'"):
        ProbeRun(Settings("203.0.113.1", 80, TCP, namespace="ct-none")).__enter__()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_the_summary_so_far(pair: Pair, number: signal.Signals) -> None:
    with servers(pair):
        run = subprocess.Popen(
            [PROGRAM, "probe", "nodeport", f"{pair.right_ip}:8080", "--from", pair.left, "-c", "1000", "-o", "json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert run.stdout is not None
        first = json.loads(run.stdout.readline())
        run.send_signal(number)
        rest = [json.loads(line) for line in run.stdout]
        run.wait()
    assert first["outcome"] == "answered"
    assert rest[-1]["type"] == "summary"
    assert rest[-1]["sent"] == len(rest)


def test_traced_probe_names_the_drop(pair: Pair, tmp_path: Path) -> None:
    shot = compile_tc("int other_shot(struct __sk_buff *skb) { return skb->protocol == bpf_htons(0x0800) ? 2 : 0; }")
    pair.attach(shot, "other_shot", pair.left, "left0", "egress")
    journal = tmp_path / "a.calitrace"
    command = [PROGRAM, "probe", "nodeport", f"{pair.right_ip}:8080", "--from", pair.left, "-c", "3", "--trace"]
    live = subprocess.run(
        [*command, "-w", str(journal), "-o", "json", "--timeout", "0.1"], capture_output=True, text=True, check=False
    )
    assert live.returncode == 1
    offline = subprocess.run(
        [PROGRAM, "report", "-r", str(journal), "-o", "json"], capture_output=True, text=True, check=True
    )
    assert offline.stdout == live.stdout
    *probes, summary = [json.loads(line) for line in live.stdout.splitlines()]
    assert [p["verdict"] for p in probes] == ["dropped"] * 3
    assert {p["by_calico"] for p in probes} == {False}
    assert probes[0]["place"] == {"namespace": pair.left, "interface": "left0", "hook": "tc egress"}
    assert probes[0]["skb_drop_reason"] == "TC_EGRESS"
    assert summary["events_lost"] == 0


def test_a_journal_survives_kill(pair: Pair, tmp_path: Path) -> None:
    journal = tmp_path / "killed.calitrace"
    with servers(pair):
        run = subprocess.Popen(
            [
                PROGRAM,
                "probe",
                "nodeport",
                f"{pair.right_ip}:8080",
                "--from",
                pair.left,
                "-c",
                "1000",
                "--trace",
                "-v",
                "-w",
                str(journal),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stderr is not None
        for _ in range(3):
            assert "answered" in run.stderr.readline()
        run.kill()
        run.communicate()
    report = subprocess.run(
        [PROGRAM, "report", "-r", str(journal), "-o", "json"], capture_output=True, text=True, check=True
    )
    *probes, summary = [json.loads(line) for line in report.stdout.splitlines()]
    assert [p["outcome"] for p in probes[:3]] == ["answered"] * 3
    assert "cut short" in summary["notes"][0]


def test_two_agents_at_once_do_not_see_each_other(pair: Pair) -> None:
    command = [PROGRAM, "probe", "nodeport", f"{pair.right_ip}:8080", "--from", pair.left, "-c", "20", "--trace"]
    with servers(pair):
        agents = [subprocess.Popen([*command, "-o", "json"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = [agent.communicate()[0] for agent in agents]
    for output in outputs:
        *probes, summary = [json.loads(line) for line in output.splitlines()]
        assert [p["number"] for p in probes] == list(range(20))
        assert {p["verdict"] for p in probes} == {"answered"}
        assert summary["events_lost"] == 0


def test_the_interface_goes_in_mid_run(pair: Pair) -> None:
    with servers(pair):
        run = subprocess.Popen(
            [
                PROGRAM,
                "probe",
                "nodeport",
                f"{pair.right_ip}:8080",
                "--from",
                pair.left,
                "-c",
                "20",
                "-o",
                "json",
                "--timeout",
                "0.1",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stdout is not None
        first = json.loads(run.stdout.readline())
        with netns.inside(pair.left), IPRoute() as route:
            route.link("del", index=route.link_lookup(ifname="left0")[0])
        rest, errors = run.communicate()
    *probes, summary = [json.loads(line) for line in rest.splitlines()]
    assert first["outcome"] == "answered"
    assert {p["outcome"] for p in probes} <= {"answered", "unanswered", "send_error"}
    assert probes[-1]["outcome"] == "send_error"
    assert summary["sent"] == 20
    assert (run.returncode, errors) == (1, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_slow_run_at_once(pair: Pair, number: signal.Signals) -> None:
    command = [PROGRAM, "probe", "nodeport", f"{pair.right_ip}:81", "--from", pair.left, "--rate", "0.01"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert "refused" in run.stdout.readline()
    run.send_signal(number)
    rest, _ = run.communicate(timeout=5)  # the next probe is due in 100 s
    assert rest == "1 sent, 0 answered, 1 refused, 0 unanswered\n"


@pytest.mark.parametrize("quoted", [28, 500])
def test_an_error_about_the_tunnel_is_an_answer(pair: Pair, quoted: int) -> None:
    """Nobody listens on 4789: the node's own error; and a router's that quotes no more than RFC 792 asks for."""
    settings = Settings(pair.right_ip, 30080, TCP, 3, 500, namespace=pair.left, tunnel=(pair.right_ip, 4789, 0xCA11C0))
    with ProbeRun(settings) as run:
        if quoted == 500:
            probes = run.run()
        else:
            drop = compile_tc("int other_shot(struct __sk_buff *skb) { return 2; }")
            pair.attach(drop, "other_shot", pair.left, "left0", "egress")
            with netns.inside(pair.right):
                router = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            with router:

                def prohibited(probe: Probe) -> None:
                    packet = run._template.request(probe.number, probe.sport)[:quoted]
                    message = b"\x03\x0d\0\0\0\0\0\0" + packet
                    message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
                    router.sendto(message, (pair.left_ip, 0))

                probes = run.run(on_sent=prohibited)
    why = "port unreachable" if quoted == 500 else "prohibited unreachable"
    assert [(p.outcome, p.detail) for p in probes] == [(Outcome.REFUSED, f"ICMP {why} from {pair.right_ip}")] * 3
    assert run.duplicates == 0


def test_each_probe_has_its_own_deadline(pair: Pair) -> None:
    """Long before the end of the run a lost probe is reported, and its half-open connection is gone."""
    drop_replies = compile_tc(
        "int cali_lose(struct __sk_buff *skb) { return skb->protocol == bpf_htons(0x0800) ? 2 : 0; }"
    )
    pair.attach(drop_replies, "cali_lose", pair.left, "left0", "ingress")
    seen: list[tuple[int, int]] = []
    settings = Settings(pair.right_ip, 8080, TCP, count=2, rate=1, namespace=pair.left, timeout_s=0.1)
    with servers(pair), ProbeRun(settings) as run:
        probes = run.run(lambda probe: seen.append((probe.number, len(run.probes))), lambda _: None)
        assert half_open(pair) == []
    assert seen == [(0, 1), (1, 2)]
    assert [probe.outcome for probe in probes] == [Outcome.UNANSWERED] * 2


def test_what_is_on_its_way_when_the_run_is_stopped_stays_open(pair: Pair) -> None:
    with netns.inside(pair.right), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((pair.right_ip, 5353))
        settings = Settings(pair.right_ip, 5353, UDP, count=3, rate=1, namespace=pair.left, timeout_s=60)
        told: list[Probe] = []
        with ProbeRun(settings) as run:
            probes = run.run(told.append, lambda probe: run.stop())
    assert [(probe.number, probe.outcome) for probe in probes] == [(0, Outcome.OPEN)]
    assert told == probes
    summary = results.summarise(probes)
    assert results.summary_lines(summary) == [
        "1 sent, 0 answered, 0 refused, 0 unanswered, 1 open when the run was stopped"
    ]
    assert results.probe_line(probes[0]).endswith("open: the run was stopped before its time was up")


def test_late_replies_are_counted_and_stay_unanswered(pair: Pair) -> None:
    with netns.inside(pair.right), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as slow:
        slow.bind((pair.right_ip, 5353))
        settings = Settings(pair.right_ip, 5353, UDP, count=2, rate=5, namespace=pair.left, timeout_s=0.05)

        def answer_twice(probe: Probe) -> None:
            if probe.number == 0:
                data, peer = slow.recvfrom(100)
                slow.sendto(data, peer)
                slow.sendto(data, peer)

        with ProbeRun(settings) as run:
            probes = run.run(answer_twice)
    assert [probe.outcome for probe in probes] == [Outcome.UNANSWERED] * 2
    assert (run.late, run.duplicates) == (1, 1)


def test_a_sender_that_was_held_up_keeps_to_its_rate(pair: Pair) -> None:
    def hold_up(probe: Probe) -> None:
        if probe.number == 0:
            time.sleep(0.5)  # the hold-up itself

    with ProbeRun(Settings(pair.right_ip, 81, TCP, count=20, rate=100, namespace=pair.left)) as run:
        probes = run.run(on_sent=hold_up)
    assert probes[19].sent_ns - probes[1].sent_ns >= 0.15e9


def test_an_exception_of_the_caller_leaves_nothing_half_open(pair: Pair) -> None:
    drop_replies = compile_tc(
        "int cali_lose(struct __sk_buff *skb) { return skb->protocol == bpf_htons(0x0800) ? 2 : 0; }"
    )
    pair.attach(drop_replies, "cali_lose", pair.left, "left0", "ingress")

    def fail(_: Probe) -> None:
        raise BrokenPipeError

    settings = Settings(pair.right_ip, 8080, TCP, namespace=pair.left)
    with servers(pair), ProbeRun(settings) as run:
        with pytest.raises(BrokenPipeError):
            run.run(on_sent=fail)
        assert half_open(pair) == []


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (Settings("192.0.2.2", 80, TCP, timeout_s=float("nan")), "timeout"),
        (Settings("192.0.2.2", 80, TCP, timeout_s=float("inf")), "timeout"),
        (Settings("192.0.2.2", 80, TCP, timeout_s=-1), "timeout"),
        (Settings("192.0.2.2", 80, TCP, rate=float("nan")), "rate"),
        (Settings("0.0.0.0", 80, TCP), "not the address of one machine"),
        (Settings("192.0.2.2", 80, TCP, tunnel=("::1", 4789, 1)), "IPv6"),
        (Settings("192.0.2.2", 80, TCP, tunnel=("192.0.2.2", 99999, 1)), "16 bits"),
        (Settings("192.0.2.2", 80, TCP, tunnel=("192.0.2.2", 4789, 1 << 24)), "VNI"),
    ],
)
def test_settings_that_cannot_be_are_one_clear_error(settings: Settings, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        ProbeRun(settings)


def test_a_prohibited_route_is_named(pair: Pair) -> None:
    with netns.inside(pair.left), IPRoute() as route:
        route.route("add", dst="198.51.100.0/24", type="prohibit")
    with pytest.raises(EnvironmentUnfit, match=r"cannot reach 198\.51\.100\.1 from .*: Permission denied"):
        ProbeRun(Settings("198.51.100.1", 80, TCP, namespace=pair.left)).__enter__()
