"""The man pages: committed as generated, with every section, and no line that 80 columns break."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted((ROOT / "docs" / "man").glob("*.1"))
SECTIONS = (
    *("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "FIELDS", "OVERHEAD", "REQUIREMENTS", "FILES"),
    *("EXIT STATUS", "EXAMPLES", "SEE ALSO"),
)
WITHOUT: dict[str, set[str]] = {
    "calitrace": {"FIELDS", "OVERHEAD", "REQUIREMENTS"},
    "calitrace-lab": {"FIELDS", "FILES"},
    **{f"calitrace-{name}": {"FILES"} for name in ("doctor", "maps", "report")},
}
COLUMNS = 73  # man indents by 7


def test_they_are_those_of_the_commands() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/gen_man.py"), "--check"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sections_and_width(page: Path) -> None:
    text = page.read_text()
    found = re.findall(r"^\.SH (.*)$", text, re.MULTILINE)
    assert [each for each in found if each != "COMMANDS"] == [
        each for each in SECTIONS if each not in WITHOUT.get(page.stem, set())
    ]
    literal = "\n".join(re.findall(r"^\.nf\n(.*?)^\.fi$", text, re.MULTILINE | re.DOTALL))
    lines = literal.replace("\\-", "-").replace("\\e", "\\").replace("\\&", "").splitlines()
    assert [line for line in lines if len(line) > COLUMNS] == []
