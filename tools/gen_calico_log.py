"""Write docs/calico-log.md: the introduction of docs/calico-log.intro.md, and every message of calico/messages.py.

With --check nothing is written: exit status 1 says that the committed page is another.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from calitrace.calico.messages import MESSAGES, STAGES, Message

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, INTRO = DOCS / "calico-log.md", DOCS / "calico-log.intro.md"
SHOWN = {"d": "N", "x": "HEX", "ip": "IP", "w": "WORD", "t": "..."}


def releases(message: Message) -> str:
    """``v3.18 - v3.24``, ``v3.30 -``, or ``all``."""
    if (message.since, message.until) == ("v3.13", ""):
        return "all"
    return f"{message.since} - {message.until}".rstrip()


def row(message: Message) -> str:
    """One row of a stage's table."""
    text = re.sub(r"\{\w+:(\w+)\}", lambda found: SHOWN[found[1]], message.template).replace("|", "\\|")
    meaning = f"{message.meaning}. **Drop:** {message.cause}." if message.cause else f"{message.meaning}."
    return f"| `{text}`{'' if message.tagged else ' (no tag)'} | {releases(message)} | {meaning} |"


def page() -> str:
    """The whole text."""
    parts = [INTRO.read_text().rstrip()]
    for stage, meaning in STAGES.items():
        rows = [row(each) for each in MESSAGES if each.stage == stage]
        if rows:
            parts.append(f"## {stage}: {meaning}\n")
            parts.append("\n".join(["| message | releases | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def main() -> int:
    """The exit status."""
    if "--check" not in sys.argv:
        PAGE.write_text(page())
        return 0
    if PAGE.exists() and PAGE.read_text() == page():
        return 0
    sys.stderr.write(f"error: {PAGE} is not what the table says\nhint: run tools/gen_calico_log.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
