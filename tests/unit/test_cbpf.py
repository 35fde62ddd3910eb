"""Classic BPF as C; that it means the same is shown in tests/kernel/test_cbpf.py."""

from __future__ import annotations

import pytest

from calitrace.cbpf import Untranslatable, c_function

RET = (0x06, 0, 0, 1)


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        ((0x00, 0, 0, 5), "a = 5u;"),
        ((0x01, 0, 0, 5), "x = 5u;"),
        ((0x60, 0, 0, 3), "a = m[3];"),
        ((0x61, 0, 0, 3), "x = m[3];"),
        ((0x80, 0, 0, 0), "a = length;"),
        ((0xB1, 0, 0, 0), "x = 4 * (w->bytes[0u & (CAPTURE_BYTES - 1)] & 15);"),
        ((0x30, 0, 0, 9), "if ((u64)9u + 1 > bytes) return 0; at = 9u;"),
        ((0x48, 0, 0, 2), "if ((u64)2u + x + 2 > bytes) return 0; at = 2u + x;"),
        ((0x20, 0, 0, 12), "a = be32_at(w->bytes + at);"),
        ((0x02, 0, 0, 1), "m[1] = a;"),
        ((0x03, 0, 0, 1), "m[1] = x;"),
        ((0x16, 0, 0, 0), "return a != 0;"),
        ((0x07, 0, 0, 0), "x = a;"),
        ((0x87, 0, 0, 0), "a = x;"),
        ((0x34, 0, 0, 7), "if (7u == 0) return 0; a = a / 7u;"),
        ((0x9C, 0, 0, 0), "if (x == 0) return 0; a = a % x;"),
        ((0x84, 0, 0, 0), "a = -a;"),
        ((0x64, 0, 0, 40), "a = a << (40u & 31);"),
        ((0x54, 0, 0, 15), "a = a & 15u;"),
        ((0x05, 0, 0, 0), "goto l1;"),
        ((0x1D, 0, 0, 0), "if (a == x) goto l1; else goto l1;"),
    ],
)
def test_each_instruction(instruction: tuple[int, int, int, int], text: str) -> None:
    function = c_function("name", [instruction, RET])
    assert function.startswith("static __always_inline int name(const struct window *w, u32 bytes, u32 length)\n{\n")
    assert text in function
    assert function.endswith("return 1u != 0;\n}\n")
    assert ("l1: return" in function) == ("goto" in function)


@pytest.mark.parametrize(
    "instructions",
    [
        [(0x05, 0, 0, 0xFFFFFFFF), RET],  # a loop
        [(0x15, 0, 5, 0), RET],  # behind the end
        [(0xC0, 0, 0, 0), RET],
        [(0x38, 0, 0, 0), RET],
        [(0xB4, 0, 0, 0), RET],
        [(0x55, 0, 0, 0), RET],
        [RET] * 1025,
    ],
)
def test_what_has_no_translation(instructions: list[tuple[int, int, int, int]]) -> None:
    with pytest.raises(Untranslatable):
        c_function("name", instructions)
