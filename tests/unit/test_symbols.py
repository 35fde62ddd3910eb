"""What /proc/kallsyms of different kernels tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from calitrace.kernel import preflight, symbols

if TYPE_CHECKING:
    from pathlib import Path

PERCPU = "0000000000000000 A fixed_percpu_data\n0000000000001000 A cpu_debug_store\n"
FUNCTIONS = "ffffffff81000000 T _stext\nffffffff81bb99f0 T kfree_skb_reason\n"


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        (FUNCTIONS, True),  # Linux 6.18
        (PERCPU + FUNCTIONS, True),  # Debian's 6.1
        (FUNCTIONS.replace("ffffffff81", "0" * 10).replace("bb99f0", "000000"), False),  # kptr_restrict
        (PERCPU, False),
        ("", False),
        (None, False),
    ],
)
def test_whether_symbols_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, readable: bool
) -> None:
    kallsyms = tmp_path / "kallsyms"
    if text is not None:
        kallsyms.write_text(text)
    monkeypatch.setattr(symbols, "KALLSYMS", kallsyms)
    assert preflight._symbols().ok is readable
