"""The program's own stdin, stdout and stderr: closed, on a full disk, of an encoding that lacks characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    pass

COMMAND = [str(Path(sys.executable).parent / "calitrace")]
LINE = "a-1     [000] ..s2.     5.000001: bpf_trace_printk: {}\n"


def run(words: list[str], redirect: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The program under a shell that *redirects* its streams."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *COMMAND, *words],
        input=b"",
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_an_empty_one(tmp_path: Path, redirect: str) -> None:
    text, journal = tmp_path / "trace.txt", tmp_path / "journal"
    text.write_text(LINE.format("eth0------------I: New packet at ifindex=2; mark=0"))
    done = run(["log", "-r", str(text), "-w", str(journal)], redirect)
    assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0)
    assert (b"New packet" in journal.read_bytes(), b"1 lines" in journal.read_bytes()) == (True, False)
    assert b"eth0" in done.stdout or ">&-" in redirect.split()
    assert b"1 lines" in done.stderr or "2>&-" in redirect


def test_a_closed_stdin_has_ended() -> None:
    done = run(["log", "-r", "-"], "<&-")
    assert (done.returncode, done.stderr) == (0, b"0 lines; 0 events lost\n")


@pytest.mark.parametrize("words", [["--help"], ["log", "-r", "-"]])
def test_no_room_for_the_output_is_one_clear_error(words: list[str]) -> None:
    done = run(words, ">/dev/full")
    assert (done.returncode, done.stderr) == (3, b"error: cannot write the output: No space left on device\n")


def test_an_encoding_may_lack_a_character(tmp_path: Path) -> None:
    text = tmp_path / "trace.txt"
    text.write_text(LINE.format("so long\N{HORIZONTAL ELLIPSIS}"), encoding="utf-8")
    done = run(["log", "-r", str(text), "--all"], "", PYTHONIOENCODING="latin1")
    assert (done.returncode, b"so long\\u2026" in done.stdout) == (0, True), done.stderr


def test_json_is_the_same_in_any_encoding(tmp_path: Path) -> None:
    text = tmp_path / "trace.txt"
    text.write_text(LINE.format("so long\N{HORIZONTAL ELLIPSIS}"), encoding="utf-8")
    done = run(["log", "-r", str(text), "--all", "-o", "json"], "", PYTHONIOENCODING="latin1")
    assert done.stdout.isascii()
    shown = [json.loads(line).get("text", "") for line in done.stdout.splitlines()]
    assert any(each.endswith("so long\N{HORIZONTAL ELLIPSIS}") for each in shown)
