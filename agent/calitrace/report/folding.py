"""Lines longer than a terminal is wide."""

from __future__ import annotations

import textwrap


def folded(line: str, width: int, indent: int) -> list[str]:
    """A line in several of *width* columns, those below *indent*; width 0: as it is."""
    if not width:
        return [line]
    below = " " * indent
    return textwrap.wrap(line, width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)
