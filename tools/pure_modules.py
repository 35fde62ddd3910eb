"""Print the files of the pure core, comma-separated: all of the package that is under no edge folder."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "agent" / "calitrace"
EDGES = ("kernel", "probes", "cluster", "lab", "cli")


def pure_files() -> list[Path]:
    """Every module that must not touch the outside world."""
    return sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in EDGES)


if __name__ == "__main__":
    sys.stdout.write(",".join(str(p) for p in pure_files()) + "\n")
