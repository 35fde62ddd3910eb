"""Classic BPF, which libpcap compiles filter expressions to, as C for our own programs.

Source of the instructions and their meaning: bpf(4) and Linux's include/uapi/linux/bpf_common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET, _MISC = range(8)
_IMM, _ABS, _IND, _MEM, _LEN, _MSH = (0x00, 0x20, 0x40, 0x60, 0x80, 0xA0)
_SIZES = {0x00: (4, "be32_at"), 0x08: (2, "be16_at"), 0x10: (1, "*")}
_ALU_OPERATORS = {0x00: "+", 0x10: "-", 0x20: "*", 0x40: "|", 0x50: "&", 0x60: "<<", 0x70: ">>", 0xA0: "^"}
_DIVISIONS = {0x30: "/", 0x90: "%"}
_JUMPS = {0x10: "a == {}", 0x20: "a > {}", 0x30: "a >= {}", 0x40: "a & {}"}
_MOST = 1024  # instructions: what a program of ours can hold besides its own


class Untranslatable(Exception):
    """The program does what this translation has no C for (a loop, of ``protochain``), or is too long."""


def c_function(name: str, instructions: Sequence[tuple[int, int, int, int]]) -> str:
    """A C function ``int NAME(const struct window *w, u32 bytes, u32 length)``: whether the packet matches.

    *instructions*: (code, jt, jf, k). *bytes*: how much of the packet the window holds; a read behind it does not
    match. *length*: of the whole packet. Raises Untranslatable.
    """
    if len(instructions) > _MOST:
        raise Untranslatable(f"{len(instructions)} instructions")
    targets: set[int] = set()
    body = [_statement(at, *each, targets) for at, each in enumerate(instructions)]
    if max(targets, default=0) >= len(instructions):
        raise Untranslatable("it jumps behind its end")
    lines = [f"l{at}: {text}" if at in targets else text for at, text in enumerate(body)]
    return (
        f"static __always_inline int {name}(const struct window *w, u32 bytes, u32 length)\n{{\n"
        "\tu32 a = 0, x = 0, at, m[16] = {};\n\n\t" + "\n\t".join(lines) + "\n}\n"
    )


def _statement(at: int, code: int, jt: int, jf: int, k: int, targets: set[int]) -> str:
    kind, operand = code & 7, "x" if code & 8 else f"{k}u"
    if kind in (_LD, _LDX):
        return _load("x" if kind == _LDX else "a", code & 0x18, code & 0xE0, k)
    if kind in (_ST, _STX):
        return f"m[{k & 15}] = {'x' if kind == _STX else 'a'};"
    if kind == _RET:
        return f"return {'a' if code & 0x18 == 0x10 else f'{k}u'} != 0;"
    if kind == _MISC:
        return "a = x;" if code & 0x80 else "x = a;"
    operation = code & 0xF0
    if kind == _ALU:
        if operation in _DIVISIONS:
            return f"if ({operand} == 0) return 0; a = a {_DIVISIONS[operation]} {operand};"
        if operation == 0x80:
            return "a = -a;"
        if operation in (0x60, 0x70):
            operand = f"({operand} & 31)"
        if operation in _ALU_OPERATORS:
            return f"a = a {_ALU_OPERATORS[operation]} {operand};"
    elif operation == 0:
        return _goto(at + 1 + k, targets)
    elif operation in _JUMPS:
        yes, no = _goto(at + 1 + jt, targets), _goto(at + 1 + jf, targets)
        return f"if ({_JUMPS[operation].format(operand)}) {yes} else {no}"
    raise Untranslatable(f"instruction {at} has code {code:#x}")


def _load(register: str, size: int, mode: int, k: int) -> str:
    if mode == _IMM:
        return f"{register} = {k}u;"
    if mode == _MEM:
        return f"{register} = m[{k & 15}];"
    if mode == _LEN:
        return f"{register} = length;"
    if mode == _MSH:
        return f"if ({k}u >= bytes) return 0; x = 4 * (w->bytes[{k}u & (CAPTURE_BYTES - 1)] & 15);"
    if mode not in (_ABS, _IND) or size not in _SIZES:
        raise Untranslatable(f"a load of mode {mode:#x}")
    width, reader = _SIZES[size]
    offset = f"(u64){k}u + x" if mode == _IND else f"(u64){k}u"
    read = f"{reader}(w->bytes + at)" if width > 1 else "w->bytes[at]"
    # The mask is for the verifier: the window has room for a read that begins in its last byte.
    return (
        f"if ({offset} + {width} > bytes) return 0; at = {k}u{' + x' * (mode == _IND)}; "
        f'asm volatile("" : "+r"(at)); at &= CAPTURE_BYTES - 1; {register} = {read};'
    )


def _goto(target: int, targets: set[int]) -> str:
    """Forward only: a program without loops ends. A jump back has a *k* beyond 2**31."""
    targets.add(target)
    return f"goto l{target};"
