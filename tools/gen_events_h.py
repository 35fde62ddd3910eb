"""Write bpf/include/events.h from the tables in calitrace.events; --check only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from calitrace.events import c_header

TARGET = Path(__file__).resolve().parent.parent / "bpf" / "include" / "events.h"


def main() -> int:
    """Exit status 1 when --check finds the committed header out of date."""
    wanted = c_header()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != wanted:
            sys.stderr.write(f"{TARGET.name} is out of date: run tools/gen_events_h.py\n")
            return 1
        return 0
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
