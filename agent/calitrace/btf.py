"""Parse BTF, the type information that the kernel and loaded BPF programs carry.

Pure: bytes in, types out. The walk only indexes the records; a type is decoded when it is asked for, because
vmlinux has more than 120,000 of them and a run needs a dozen.
Source of the format: Documentation/bpf/btf.rst in Linux.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from calitrace.errors import Malformed

MAGIC = 0xEB9F
KIND_INT, KIND_PTR, KIND_ARRAY, KIND_STRUCT, KIND_UNION, KIND_ENUM, KIND_FWD, KIND_TYPEDEF = range(1, 9)
KIND_VOLATILE, KIND_CONST, KIND_RESTRICT, KIND_FUNC, KIND_FUNC_PROTO, KIND_VAR = range(9, 15)
KIND_DATASEC, KIND_FLOAT, KIND_DECL_TAG, KIND_TYPE_TAG, KIND_ENUM64 = range(15, 20)

# Bytes after the 12-byte btf_type header: (fixed, per vlen item).
_TAIL = {
    KIND_INT: (4, 0),
    KIND_PTR: (0, 0),
    KIND_ARRAY: (12, 0),
    KIND_STRUCT: (0, 12),
    KIND_UNION: (0, 12),
    KIND_ENUM: (0, 8),
    KIND_FWD: (0, 0),
    KIND_TYPEDEF: (0, 0),
    KIND_VOLATILE: (0, 0),
    KIND_CONST: (0, 0),
    KIND_RESTRICT: (0, 0),
    KIND_FUNC: (0, 0),
    KIND_FUNC_PROTO: (0, 8),
    KIND_VAR: (4, 0),
    KIND_DATASEC: (0, 12),
    KIND_FLOAT: (0, 0),
    KIND_DECL_TAG: (4, 0),
    KIND_TYPE_TAG: (0, 0),
    KIND_ENUM64: (0, 12),
}
_TRANSPARENT = (KIND_TYPEDEF, KIND_VOLATILE, KIND_CONST, KIND_RESTRICT, KIND_TYPE_TAG)
POINTER_BYTES = 8


@dataclass(frozen=True)
class Member:
    """One member of a struct or union. *offset_bits* from the start of the outermost struct asked for."""

    name: str
    type_id: int
    offset_bits: int
    bitfield_bits: int

    @property
    def offset(self) -> int:
        """Byte offset; meaningless for a bit field."""
        return self.offset_bits // 8


class _Words(dict[int, int]):
    """How many words a type takes, by its word of kind and number of items: of those there are only a few hundred."""

    def __missing__(self, info: int) -> int:
        fixed, each = _TAIL[info >> 24 & 0x1F]
        self[info] = words = (12 + fixed + each * (info & 0xFFFF)) >> 2
        return words


class Btf:
    """The types of one BTF blob. *raw*: the blob, in the byte order of this machine (little-endian)."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) < 24:
            raise Malformed(0, "a 24-byte BTF header", f"{len(raw)} bytes", "BTF")
        magic, version, _flags, hdr_len, type_off, type_len, str_off, str_len = struct.unpack_from("<HBBIIIII", raw)
        if magic != MAGIC or version != 1:
            raise Malformed(0, f"magic {MAGIC:#x} version 1", f"magic {magic:#x} version {version}", "BTF")
        start, strings = hdr_len + type_off, hdr_len + str_off
        if start + type_len > len(raw) or strings + str_len > len(raw):
            raise Malformed(8, "sections inside the blob", f"sections beyond {len(raw)} bytes", "BTF")
        self._strings = raw[strings : strings + str_len]
        self._types = raw[start : start + type_len]
        self._words = self._index(start)
        self._names: dict[tuple[int, bytes], int] = {}

    def _index(self, start: int) -> list[int]:
        """Where each type begins, in words. A kernel has more than 100,000: this loop is what reading them costs."""
        begins = [0]  # type id 0 is void
        append, length = begins.append, _Words()
        words = memoryview(self._types[: len(self._types) & ~3]).cast("I")
        at, last = 0, len(words) - 3
        try:
            while at <= last:
                append(at)
                at += length[words[at + 1]]
        except KeyError as kind:
            raise Malformed(start + 4 * at, "a known BTF kind", f"kind {kind}", "BTF type") from None
        if 4 * at != len(self._types):
            end = start + len(self._types)
            raise Malformed(start + 4 * at, f"the type section to end at {end}", "a record across the end", "BTF type")
        return begins

    def _at(self, type_id: int) -> int:
        """Where a type begins in the type section, in bytes."""
        return 4 * self._words[type_id]

    def __len__(self) -> int:
        return len(self._words)

    def _string(self, offset: int) -> bytes:
        end = self._strings.find(b"\0", offset)
        return self._strings[offset:end] if end >= 0 else b""

    def _header(self, type_id: int) -> tuple[int, int, int, int, int]:
        """(name offset, kind, vlen, size or type id, kind_flag) of a type."""
        if not 0 < type_id < len(self._words):
            raise Malformed(0, f"a type id below {len(self._words)}", str(type_id), "BTF type")
        name, info, size = struct.unpack_from("<III", self._types, self._at(type_id))
        return name, (info >> 24) & 0x1F, info & 0xFFFF, size, info >> 31

    def kind(self, type_id: int) -> int:
        """The kind (KIND_*) of a type; 0 for void."""
        return self._header(type_id)[1] if type_id else 0

    def name(self, type_id: int) -> str:
        """The name of a type, empty when it has none."""
        return self._string(self._header(type_id)[0]).decode(errors="replace") if type_id else "void"

    def find(self, name: str, *kinds: int) -> int | None:
        """The id of the first type called *name* of one of *kinds*, or None."""
        wanted = b"\0" + name.encode() + b"\0"
        ids = []
        at = self._strings.find(wanted)
        while at >= 0:  # a name may lie in the string section more than once
            ids.append(self._first_named(at + 1, kinds))
            at = self._strings.find(wanted, at + 1)
        return min((each for each in ids if each), default=None)

    def _first_named(self, name_off: int, kinds: tuple[int, ...]) -> int:
        """The first type of one of *kinds* whose name has this offset, 0 for none."""
        wanted = struct.pack("<I", name_off)
        at = self._types.find(wanted)
        while at >= 0:
            type_id = bisect_right(self._words, at / 4) - 1
            if self._words[type_id] == at / 4 and self.kind(type_id) in kinds:
                return type_id
            at = self._types.find(wanted, at + 1)
        return 0

    def resolve(self, type_id: int) -> int:
        """Follow typedefs and qualifiers to the type behind them. Raises Malformed when they go in a circle."""
        for _ in range(len(self._words)):
            if self.kind(type_id) not in _TRANSPARENT:
                return type_id
            type_id = self.target(type_id)
        raise Malformed(0, "a type behind typedefs", "a cycle", "BTF type")

    def size(self, type_id: int) -> int:
        """Size in bytes. Raises Malformed for a type without one (function, void, forward declaration)."""
        type_id = self.resolve(type_id)
        kind = self.kind(type_id)
        if kind == KIND_PTR:
            return POINTER_BYTES
        if kind == KIND_ARRAY:
            element, count = self.array(type_id)
            return self.size(element) * count
        if kind in (KIND_INT, KIND_STRUCT, KIND_UNION, KIND_ENUM, KIND_FLOAT, KIND_ENUM64):
            return self._header(type_id)[3]
        raise Malformed(0, "a type with a size", f"kind {kind}", "BTF type")

    def target(self, type_id: int) -> int:
        """The type id that a pointer, typedef or qualifier refers to."""
        return self._header(type_id)[3]

    def array(self, type_id: int) -> tuple[int, int]:
        """(element type id, number of elements) of an array."""
        element, _index, count = struct.unpack_from("<III", self._types, self._at(type_id) + 12)
        return element, count

    def signed(self, type_id: int) -> bool:
        """Whether an integer type is signed."""
        (encoding,) = struct.unpack_from("<I", self._types, self._at(type_id) + 12)
        return bool((encoding >> 24) & 1)

    def members(self, type_id: int) -> list[Member]:
        """The direct members of a struct or union, in order."""
        _, kind, vlen, _, kind_flag = self._header(type_id)
        if kind not in (KIND_STRUCT, KIND_UNION):
            raise Malformed(0, "a struct or union", f"kind {kind}", "BTF type")
        found = []
        for item in range(vlen):
            name, member_type, offset = struct.unpack_from("<III", self._types, self._at(type_id) + 12 + 12 * item)
            bits = offset >> 24 if kind_flag else 0
            found.append(
                Member(
                    self._string(name).decode(errors="replace"),
                    member_type,
                    offset & 0xFFFFFF if kind_flag else offset,
                    bits,
                )
            )
        return found

    def iter_flat(self, type_id: int, base_bits: int = 0) -> Iterator[Member]:
        """All named members of a struct, those of anonymous structs and unions included, at true offsets."""
        for member in self.members(type_id):
            inner = self.resolve(member.type_id)
            if not member.name and self.kind(inner) in (KIND_STRUCT, KIND_UNION):
                yield from self.iter_flat(inner, base_bits + member.offset_bits)
            else:
                yield Member(
                    member.name,
                    member.type_id,
                    base_bits + member.offset_bits,
                    member.bitfield_bits,
                )

    def struct(self, name: str) -> dict[str, Member] | None:
        """Members by name of ``struct name`` (anonymous parts flattened), or None when it does not exist."""
        type_id = self.find(name, KIND_STRUCT)
        if type_id is None:
            return None
        return {member.name: member for member in self.iter_flat(type_id)}

    def enum(self, name: str) -> dict[int, str] | None:
        """Value to name of ``enum name``, or None when the kernel has no such enum."""
        type_id = self.find(name, KIND_ENUM, KIND_ENUM64)
        if type_id is None:
            return None
        _, kind, vlen, _, signed = self._header(type_id)
        at = self._at(type_id) + 12
        values: dict[int, str] = {}
        for item in range(vlen):
            if kind == KIND_ENUM:
                name_off, value = struct.unpack_from("<Ii" if signed else "<II", self._types, at + 8 * item)
            else:
                name_off, low, high = struct.unpack_from("<III", self._types, at + 12 * item)
                value = low | high << 32
            values.setdefault(value, self._string(name_off).decode(errors="replace"))
        return values

    def parameters(self, typedef: str) -> list[str] | None:
        """Parameter type names of ``typedef void (*NAME)(...)``, as ``btf_trace_*`` are; None when absent.

        A pointer to a struct is given as ``struct name *``.
        """
        type_id = self.find(typedef, KIND_TYPEDEF)
        if type_id is None:
            return None
        proto = self.target(self.resolve(type_id))
        _, kind, vlen, _, _ = self._header(proto)
        if kind != KIND_FUNC_PROTO:
            raise Malformed(0, "a function prototype", f"kind {kind}", f"typedef {typedef}")
        at = self._at(proto) + 12
        return [self.spelling(struct.unpack_from("<II", self._types, at + 8 * item)[1]) for item in range(vlen)]

    def spelling(self, type_id: int) -> str:
        """A type as C spells it, without qualifiers."""
        if not type_id:
            return "void"
        kind = self.kind(type_id)
        if kind in (KIND_VOLATILE, KIND_CONST, KIND_RESTRICT, KIND_TYPE_TAG):
            return self.spelling(self.target(type_id))
        if kind == KIND_PTR:
            return self.spelling(self.target(type_id)) + " *"
        prefix = {KIND_STRUCT: "struct ", KIND_UNION: "union ", KIND_ENUM: "enum ",
                  KIND_ENUM64: "enum "}.get(kind, "")  # fmt: skip
        return prefix + self.name(type_id)
