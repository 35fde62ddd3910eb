"""Chunks of bytes: what is in them, and their lines, wherever the cuts are."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace import journal, sources
from calitrace.errors import UsageError

JOURNAL = journal.frame(journal.HEADER, {"schema": journal.SCHEMA})


def cut(raw: bytes, sizes: list[int]) -> list[bytes]:
    """*raw* in pieces of these sizes, the rest in one."""
    pieces = []
    for size in sizes:
        pieces.append(raw[:size])
        raw = raw[size:]
    return [*pieces, raw]


BYTES = st.lists(st.sampled_from([b"\n", b"\r", b"a", b"\xff", b"\xc3\xa9"])).map(b"".join)


@given(BYTES, st.lists(st.integers(0, 9)))
def test_lines_do_not_depend_on_the_cuts(raw: bytes, sizes: list[int]) -> None:
    lines = sources.Lines()
    found = [line for chunk in cut(raw, sizes) for line in lines.feed(chunk)] + lines.flush()
    whole = raw.split(b"\n")
    expected = whole if whole[-1] else whole[:-1]
    assert [line.encode(errors="surrogateescape") for line in found] == expected


def test_a_line_without_end_comes_in_pieces() -> None:
    lines = sources.Lines()
    size = sources.LONGEST_LINE
    assert [len(line) for line in lines.feed(b"x" * (2 * size + 5))] == [size, size]
    assert lines.flush() == ["x" * 5]
    assert lines.flush() == []


@given(st.binary(max_size=99), st.lists(st.integers(0, 9)), st.booleans(), st.booleans())
def test_what_it_is_does_not_depend_on_the_cuts(rest: bytes, sizes: list[int], ours: bool, packed: bool) -> None:
    plain = (JOURNAL if ours else b"text") + rest
    raw = gzip.compress(plain[:7]) + gzip.compress(plain[7:]) if packed else plain
    is_journal, chunks = sources.told_apart(cut(raw, sizes), "f")
    assert (is_journal, b"".join(chunks)) == (ours, plain)


def test_nothing_is_no_journal() -> None:
    is_journal, chunks = sources.told_apart([], "f")
    assert (is_journal, list(chunks)) == (False, [])


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (gzip.compress(b"hello" * 99)[:-9], "f: the gzip file is cut short"),
        (gzip.compress(b"hello")[:10] + b"\xff" * 99, "f: damaged gzip: "),
    ],
)
def test_damage_is_told_after_what_could_be_read(raw: bytes, cause: str) -> None:
    def read() -> bytes:
        return b"".join(sources.told_apart([raw], "f")[1])

    with pytest.raises(UsageError, match=cause):
        read()
