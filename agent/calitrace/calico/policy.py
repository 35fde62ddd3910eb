"""Felix's policy debug files: the policy program of an interface, and which rule a rule id stands for.

Felix writes one JSON file per interface and hook (``/var/run/calico/bpf/policy/*.json``, needs
bpfPolicyDebugEnabled, since v3.24): the policy program's instructions, some with comments. Those that we read:
``Start of policy NAME`` (newer: ``Start of KIND NAME ID``), ``Start of rule TEXT``, ``Rule MatchID: DECIMAL``.
Source: calico felix/bpf/types.go (PolicyDebugInfo), felix/bpf/polprog/pol_prog_builder.go.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calitrace.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DIRECTORY = "/var/run/calico/bpf/policy"
_MATCH_ID = re.compile(r"Rule MatchID:\s*(0x[0-9a-fA-F]+|\d+)")
_START = re.compile(r"Start of (?P<kind>\S+)\s*(?P<rest>.*)", re.DOTALL)
_END_OF_RULE = "End of rule"
_CONCISE = ("Start of ", "End of ", "IPSets ", "Match: ")
_SIZE, _LAST_REGISTER = 8, 10
_ACTION = re.compile(r'action:\s*"(?P<action>\w+)"', re.IGNORECASE)


# Calico's names of the instructions. Source: calico felix/bpf/asm/{asm,opcode_string}.go.
_ALU = ("Add", "Sub", "Mul", "Div", "Or", "And", "ShiftL", "ShiftR", "Negate", "Mod", "XOR", "Mov", "AShiftR", "Endian")
_JUMP = ("", "Eq", "GT", "GE", "Set", "NE", "SGT", "SGE", "", "", "LT", "LE", "SLT", "SLE")
_ALONE = {0x00: "LoadImm64Pt2", 0x05: "JumpA", 0x18: "LoadImm64", 0x85: "Call", 0x95: "Exit"}
_MEMORY = {0x02: "StoreImm", 0x61: "LoadReg", 0x63: "StoreReg"}  # StoreImm so in Calico, of 0x62 in the kernel
_WIDTHS = {0x00: "32", 0x08: "16", 0x10: "8", 0x18: "64"}


@dataclass(frozen=True)
class Instruction:
    """An instruction of a policy program: its bytes, the labels and comments before it."""

    code: bytes
    labels: Iterable[str]
    comments: Iterable[str]
    annotation: str

    def line(self) -> str:
        """As Calico shows it: bytes, the instruction in words, and the annotation. Bytes alone when they are no 8."""
        if len(self.code) != _SIZE:
            return f"      {self.code.hex()} {self.annotation}".rstrip()
        code, registers, offset, value = struct.unpack("<BBhi", self.code)
        target, source = (f"R{n}" if n <= _LAST_REGISTER else f"Reg({n})" for n in (registers & 0xF, registers >> 4))
        words = f"{_operation(code)} dst={target} src={source} off={offset} imm={value & 0xFFFFFFFF:#010x}/{value}"
        return f"      {self.code.hex()} {words:<80}{self.annotation}".rstrip()


def _operation(code: int) -> str:
    if code in _ALONE:
        return _ALONE[code]
    if code & 0xE7 in _MEMORY:
        return _MEMORY[code & 0xE7] + _WIDTHS[code & 0x18]
    kind, number = code & 7, code >> 4
    names = _ALU if kind in (4, 7) else _JUMP if kind in (5, 6) else ()
    name = names[number] if number < len(names) else ""
    if not name or (name == "Negate" and not code & 8):
        return f"OpCode({code})"
    name += ("" if code & 8 else "Imm") + ("32" if kind in (4, 6) else "64")
    return f"Jump{name}" if names is _JUMP else name


@dataclass(frozen=True)
class DebugFile:
    """What Felix wrote of one interface and hook. *hook*: the kernel's, such as ``tc egress``.

    *listed*: thousands of instructions as JSON has them, which are looked at as they are asked for.
    """

    interface: str
    hook: str
    error: str
    listed: tuple[object, ...]

    def rule_names(self) -> dict[int, str]:
        """Rule id to ``POLICY rule N (action)``; rules behind all policies are those of profiles."""
        names: dict[int, str] = {}
        policy, rule, number = "profile", "", -1
        for comment in (comment for each in self.listed for comment in _texts(each, "comments")):
            if found := _START.match(comment):
                if found["kind"] == "rule":
                    rule, number = found["rest"], number + 1
                elif found["kind"] != "tier":
                    policy, rule, number = f"{found['kind']} {found['rest']}".strip(), "", -1
            elif comment.startswith("End of ") and not comment.startswith(_END_OF_RULE):
                policy, rule, number = "profile", "", -1 if policy != "profile" else number
            elif found := _MATCH_ID.match(comment):
                action = _ACTION.search(rule)
                shown = f"{policy.removeprefix('policy ')} rule {max(number, 0)}"
                names[int(found[1], 0)] = f"{shown} ({action['action'].lower()})" if action else shown
        return names

    def iter_lines(self, hits: Mapping[int, int], *, instructions: bool) -> Iterator[str]:
        """As ``calico-node -bpf policy dump`` up to v3.32: rules with their hits, with *instructions* everything.

        *hits*: by rule id.
        """
        yield f"IfaceName: {self.interface}"
        yield f"Hook: {self.hook}"
        yield f"Error: {self.error}".rstrip()
        yield "Policy Info:"
        for each in map(_instruction, self.listed):
            for comment in each.comments:
                if found := _MATCH_ID.match(comment):
                    yield f"// count = {hits.get(int(found[1], 0), 0)}"
                elif instructions or comment.startswith(_CONCISE):
                    yield f"// {comment}"
            if instructions:
                yield from (f"{label}:" for label in each.labels)
                yield each.line()


def read(raw: bytes) -> DebugFile:
    """One file. Raises Malformed when it is not such a file; parts that are not as they should be are left out."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as wrong:
        raise Malformed(0, "JSON", str(wrong), "policy debug file") from wrong
    if not isinstance(document, dict):
        raise Malformed(0, "an object", type(document).__name__, "policy debug file")
    found = {name.lower(): value for name, value in document.items()}
    listed = found.get("policyinfo")
    interface, hook, error = (str(found.get(name, "")) for name in ("ifacename", "hook", "error"))
    return DebugFile(interface, hook, error, tuple(listed) if isinstance(listed, list) else ())


def rule_names(raw: bytes) -> dict[int, str]:
    """The names of one file's rules. Raises Malformed as :func:`read`."""
    return read(raw).rule_names()


def _instruction(listed: object) -> Instruction:
    code = _member(listed, "inst")
    numbers = code if isinstance(code, list) and all(isinstance(n, int) and 0 <= n < 256 for n in code) else []
    annotation = _member(listed, "annotation")
    return Instruction(bytes(numbers), _texts(listed, "labels"), _texts(listed, "comments"), str(annotation or ""))


def _texts(listed: object, name: str) -> Iterator[str]:
    found = _member(listed, name)
    return (each.strip() for each in (found if isinstance(found, list) else ()) if isinstance(each, str))


def _member(listed: object, name: str) -> object:
    """One of an instruction's, whose names Felix has written in small letters and with capitals."""
    if not isinstance(listed, dict):
        return None
    return listed.get(name, listed.get(name.capitalize()))
