"""Errors that reach the user: one cause, one way out, one exit code."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit status of every command."""

    DONE = 0
    FINDINGS = 1
    USAGE = 2
    ENVIRONMENT = 3
    NOT_CALICO = 4


class Error(Exception):
    """A failure the user can act on.

    *cause*: one sentence without a full stop. *hint*: what to do next, or empty.
    """

    exit = Exit.ENVIRONMENT

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint


class UsageError(Error):
    """The command line asks for something that cannot be."""

    exit = Exit.USAGE


class EnvironmentUnfit(Error):
    """This machine lacks something: a privilege, a mount, a kernel feature, a package."""

    exit = Exit.ENVIRONMENT


class NotCalico(Error):
    """There is no Calico eBPF dataplane where one was needed."""

    exit = Exit.NOT_CALICO


class Malformed(Error):
    """Bytes that do not form the record they should.

    *offset*: byte offset in the input. *expected*, *actual*: what the table says and what was there.
    *record*: the name of the table.
    """

    def __init__(self, offset: int, expected: str, actual: str, record: str) -> None:
        super().__init__(f"malformed {record} at byte {offset}: expected {expected}, found {actual}")
        self.offset = offset
        self.expected = expected
        self.actual = actual
        self.record = record


class LayoutMismatch(Malformed):
    """A size or version that fits no known table."""
