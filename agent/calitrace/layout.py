"""A record is a table of fields; from it come the decoder, the encoder and the C declaration.

All our records are little-endian with natural alignment and explicit, zeroed padding: what C would add by
itself must be a field, or ``Record`` refuses the table.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from calitrace.errors import LayoutMismatch

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "s32": "i", "s64": "q"}


@dataclass(frozen=True)
class Field:
    """One member. *ctype*: u8, u16, u32, u64, s32 or s64; *count* > 1 makes it bytes (u8 only).

    *doc* says unit and byte order; NBO is network byte order, HBO (the default) the host's.
    """

    name: str
    ctype: str
    doc: str = ""
    count: int = 1

    @property
    def width(self) -> int:
        """Size of one element in bytes."""
        return struct.calcsize(_FORMATS[self.ctype])

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.width * self.count

    @property
    def format(self) -> str:
        """The struct module's code for it."""
        return f"{self.count}s" if self.count > 1 else _FORMATS[self.ctype]


@dataclass(frozen=True)
class Record:
    """A named sequence of fields without gaps."""

    name: str
    doc: str
    fields: tuple[Field, ...]
    _struct: struct.Struct = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at = 0
        for each in self.fields:
            if each.count > 1 and each.ctype != "u8":
                raise ValueError(f"{self.name}.{each.name}: only u8 arrays are supported")
            if at % each.width:
                raise ValueError(f"{self.name}.{each.name}: unaligned at {at}; add explicit padding")
            at += each.size
        if at % max(each.width for each in self.fields):
            raise ValueError(f"{self.name}: {at} bytes need explicit padding at the end")
        object.__setattr__(self, "_struct", struct.Struct("<" + "".join(f.format for f in self.fields)))

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._struct.size

    def offset(self, name: str) -> int:
        """Byte offset of a field."""
        at = 0
        for each in self.fields:
            if each.name == name:
                return at
            at += each.size
        raise KeyError(name)

    def unpack(self, raw: bytes) -> tuple[int | bytes, ...]:
        """The values in field order. Raises LayoutMismatch when *raw* has another length."""
        if len(raw) != self.size:
            raise LayoutMismatch(0, f"{self.size} bytes", f"{len(raw)} bytes", self.name)
        return self._struct.unpack(raw)

    def unpack_head(self, raw: bytes) -> tuple[int | bytes, ...]:
        """The same of the beginning of *raw*. Raises LayoutMismatch when it is too short."""
        if len(raw) < self.size:
            raise LayoutMismatch(0, f"at least {self.size} bytes", f"{len(raw)} bytes", self.name)
        return self._struct.unpack_from(raw)

    def decode(self, raw: bytes) -> dict[str, int | bytes]:
        """The values by field name. Raises LayoutMismatch when *raw* has another length."""
        return dict(zip((f.name for f in self.fields), self.unpack(raw), strict=True))

    def encode(self, **values: int | bytes) -> bytes:
        """The bytes of a record; fields not given are zero."""
        unknown = values.keys() - {f.name for f in self.fields}
        if unknown:
            raise KeyError(f"{self.name} has no field {', '.join(sorted(unknown))}")
        return self._struct.pack(*(values.get(f.name, b"" if f.count > 1 else 0) for f in self.fields))

    def c_struct(self) -> str:
        """The C declaration, with a static assertion for each offset and the size."""
        lines = [f"/* {self.doc} */", f"struct {self.name} {{"]
        for each in self.fields:
            array = f"[{each.count}]" if each.count > 1 else ""
            doc = f" /* {each.doc} */" if each.doc else ""
            lines.append(f"\t{each.ctype} {each.name}{array};{doc}")
        lines.append("};")
        for each in self.fields:
            lines.append(
                f"_Static_assert(__builtin_offsetof(struct {self.name}, {each.name}) == "
                f'{self.offset(each.name)}, "{self.name}.{each.name}");'
            )
        lines.append(f'_Static_assert(sizeof(struct {self.name}) == {self.size}, "{self.name}");')
        return "\n".join(lines)
