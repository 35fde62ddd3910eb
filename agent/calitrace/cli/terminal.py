"""How wide the terminal is."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

_NARROWEST = 80  # what everything is made for; a narrower terminal wraps


def columns(stream: TextIO | None = None) -> int:
    """Columns of the terminal behind *stream* (stdout), 0 where there is none."""
    return max(shutil.get_terminal_size().columns, _NARROWEST) if (stream or sys.stdout).isatty() else 0
