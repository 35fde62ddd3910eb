"""What a terminal gets: colours unless NO_COLOR is set, whole sentences of help, lines of its width."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest

from calitrace.cli.main import cli

COMMAND = [str(Path(sys.executable).parent / "calitrace")]
RED = b"\x1b[31m"
LINES = b"".join(
    b"a-1     [000] ..s2.     5.00000%d: bpf_trace_printk: eth0------------I: %s\n" % (number, text)
    for number, text in enumerate(
        [
            b"New packet at ifindex=2; mark=0",
            b"DENY due to policy",
            b"Final result=DENY (0). Program execution time: 1ns",
        ]
    )
)


def on_a_terminal(*words: str, **environment: str) -> bytes:
    """What the program writes to a terminal of 80 columns."""
    reader, writer = pty.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, *words],
            stdout=writer,
            stderr=subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if key != "NO_COLOR"} | environment,
        ):
            os.close(writer)
            found = b""
            try:
                while block := os.read(reader, 65536):
                    found += block
            except OSError:  # how the kernel says that nobody has the other end any more
                return found
        return found
    finally:
        os.close(reader)


@pytest.mark.parametrize(("environment", "red"), [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)])
def test_no_color(tmp_path: Path, environment: dict[str, str], red: bool) -> None:
    (tmp_path / "trace.txt").write_bytes(LINES)
    found = on_a_terminal("log", "-r", str(tmp_path / "trace.txt"), COLUMNS="80", **environment)
    assert b"DENY" in found
    assert (RED in found) == red


@pytest.mark.parametrize("group", ["maps", "maps conntrack", "lab", "probe"])
def test_help_cuts_no_sentence(group: str) -> None:
    context = click.Context(cli)
    command: click.Command | None = cli
    for name in group.split():
        assert isinstance(command, click.Group)
        command = command.get_command(context, name)
    assert command is not None
    assert "..." not in command.get_help(context).partition("Commands:")[2]


def test_doctor_breaks_no_word() -> None:
    lines = on_a_terminal("doctor", COLUMNS="80").decode().splitlines()
    assert len(lines) > 10
    assert max(map(len, lines)) <= 80
