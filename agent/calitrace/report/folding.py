"""Lines longer than a terminal is wide."""

from __future__ import annotations

import re
import textwrap

WIDTH = 80
_WORD = re.compile(r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"]|['\"])+")


def folded(line: str, width: int, indent: int) -> list[str]:
    """A line in several of *width* columns, those below *indent*; width 0: as it is."""
    if not width:
        return [line]
    below = " " * indent
    return textwrap.wrap(line, width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)


def folded_command(text: str, first: str) -> list[str]:
    """A command that a shell still takes: broken between words, with a backslash, and before a comment."""
    command, _, comment = text.partition("  # ")
    lines = [first]
    for word in _WORD.findall(command):
        longer = f"{lines[-1]}{word} "
        if len(longer) > WIDTH - 1 and lines[-1].strip() and lines[-1] != first:
            lines[-1] += "\\"
            lines.append(" " * (len(first) + 2) + f"{word} ")
        else:
            lines[-1] = longer
    if comment and len(lines[-1]) + len(comment) + 3 <= WIDTH:
        lines[-1] += f" # {comment}"
    elif comment:
        indent = " " * len(first)
        lines += textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    return [line.rstrip() for line in lines]
