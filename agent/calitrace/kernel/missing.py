"""What becomes of a source that cannot be read: the reason, in place of its value."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from calitrace.checks.snapshot import Missing
from calitrace.errors import Error, UsageError

T = TypeVar("T")


def or_missing(read: Callable[[], T], name: str) -> T | Missing:
    """What *read* returns, or why it could not. *name*: of the source, for failures of the kernel."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        return read()
    except UsageError as failure:
        return Missing(f"{failure.cause} ({failure.hint})")
    except Error as failure:
        return Missing(failure.cause)
    except NetlinkError as failure:
        return Missing(f"{name}: {os.strerror(failure.code)}")
    except OSError as failure:
        return Missing(f"{name}: {failure.strerror}")
