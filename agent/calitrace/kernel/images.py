"""Compiled BPF programs that need no compiler any more: their instructions, and the maps that they use.

BCC's compiler takes most of the time of a start, and its libraries most of the memory. What it made is kept below
CACHE, under a digest of all that it was made from; what differs from run to run is put into the instructions when they
are loaded. Programs are verified anew at each start.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import child, headers, loader, syscall

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from calitrace.btf import Btf

CACHE = Path("/var/cache/calitrace")
_CHILD = "from calitrace.kernel import images; images.compile_for(sys.argv[1])"
_log = logging.getLogger(__name__)
_KEPT = 32  # one for each set of options that somebody used
_INSTRUCTION = struct.Struct("=BBhi")  # struct bpf_insn of include/uapi/linux/bpf.h
_LOAD_64, _PSEUDO_MAP_FD = 0x18, 1
_CALL, _PSEUDO_KFUNC_CALL = 0x85, 2
KFUNC_CALL = 1 << 30  # a helper's number from here on is meant as a kernel function's id in BTF, which C cannot say
_PER_RUN = 0xCA117ACE  # the upper half of a constant of bpf/include/packet.h whose value is a run's; the lower is which


@dataclass(frozen=True)
class Map:
    """A map as it is made. Sizes in bytes. *inner*: name of the map that those in a map of maps are like, or ""."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    inner: str = ""


@dataclass(frozen=True)
class Function:
    """*code*: instructions, with 0 for each map's descriptor. *maps*: where, in instructions, which map belongs."""

    code: bytes
    maps: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Image:
    """All maps and functions of a compiled source, by name."""

    maps: dict[str, Map]
    functions: dict[str, Function]

    def pack(self) -> bytes:
        """With a digest in front."""
        import msgpack

        plain = [{name: astuple(each) for name, each in part.items()} for part in (self.maps, self.functions)]
        body: bytes = msgpack.packb(plain)
        return hashlib.sha256(body).digest() + body

    @classmethod
    def unpack(cls, packed: bytes) -> Image:
        """The reverse. Raises ValueError for anything else."""
        import msgpack

        digest, body = packed[:32], packed[32:]
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("no image, or a broken one")
        try:
            maps, functions = msgpack.unpackb(body, use_list=False)
            return cls(
                {name: Map(*each) for name, each in maps.items()},
                {name: Function(*each) for name, each in functions.items()},
            )
        except (TypeError, AttributeError) as wrong:
            raise ValueError(f"an image of another form: {wrong}") from wrong

    def code(self, function: str, maps: Mapping[str, int], values: Mapping[int, int]) -> bytes:
        """The instructions with descriptors of maps and the values (32 bits, unsigned) of this run."""
        found = self.functions[function]
        code = bytearray(found.code)
        size = _INSTRUCTION.size
        for at, name in found.maps:
            struct.pack_into("=i", code, at * size + 4, maps[name])
        for at in range(0, len(code) - size, size):
            opcode, registers, _, low = _INSTRUCTION.unpack_from(code, at)
            (high,) = struct.unpack_from("=I", code, at + size + 4)
            if opcode == _LOAD_64 and registers >> 4 == 0 and high == _PER_RUN:
                struct.pack_into("=I", code, at + 4, values[low])
                struct.pack_into("=I", code, at + size + 4, 0)
        return bytes(code)


def image_of(bpf: Any, functions: Iterable[str], inner: Mapping[str, str]) -> Image:
    """What BCC compiled. *bpf*: a ``bcc.BPF``; *inner*: for each map of maps, the one that those in it are like."""
    from bcc.libbcc import lib

    # Handles of our own: BCC's Python has none, and without a signature the module's address is cut to 32 bits.
    count, name_of, descriptor_of = lib["bpf_num_tables"], lib["bpf_table_name"], lib["bpf_table_fd_id"]
    count.restype, count.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
    name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_size_t)
    descriptor_of.restype, descriptor_of.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_size_t)
    tables = range(count(bpf.module))
    descriptors = {name_of(bpf.module, each).decode(): descriptor_of(bpf.module, each) for each in tables}
    names = {descriptor: name for name, descriptor in descriptors.items()}
    maps = {}
    for name, descriptor in descriptors.items():
        i = syscall.map_info(descriptor)
        maps[name] = Map(i.type, i.key_size, i.value_size, i.max_entries, i.flags, inner.get(name, ""))
    return Image(maps, {each: _without_descriptors(bpf.dump_func(each.encode()), names) for each in functions})


def _without_descriptors(code: bytes, names: Mapping[int, str]) -> Function:
    anonymous = bytearray(code)
    maps = []
    for at, (opcode, registers, _, value) in enumerate(_INSTRUCTION.iter_unpack(code)):
        if opcode == _LOAD_64 and registers >> 4 == _PSEUDO_MAP_FD:
            maps.append((at, names[value]))
            struct.pack_into("=i", anonymous, at * _INSTRUCTION.size + 4, 0)
        elif opcode == _CALL and registers == 0 and value >= KFUNC_CALL:
            call = _INSTRUCTION.pack(opcode, _PSEUDO_KFUNC_CALL << 4, 0, value - KFUNC_CALL)
            anonymous[at * _INSTRUCTION.size : (at + 1) * _INSTRUCTION.size] = call
    return Function(bytes(anonymous), tuple(maps))


def compiled(
    text: str, functions: Iterable[str], *, defines: Mapping[str, str], types: Btf | None, inner: Mapping[str, str]
) -> Image:
    """The image of a source, compiled only if nobody did it before. *inner*: as of `image_of`.

    Raises as `loader.compile_bpf`.
    """
    loader.require_privilege()
    functions = list(functions)
    structs = headers.structs_from(types).structs if types is not None else None
    system = os.uname()
    made_by = [Path(each).read_bytes() for each in (__file__, headers.__file__, loader.__file__)]
    made_from = (system[2:], _compiler(), made_by, structs, text, sorted(defines.items()), functions, inner)
    kept = CACHE / hashlib.sha256(repr(made_from).encode()).hexdigest()
    try:
        return _read(kept)
    except (OSError, ValueError) as reason:
        _log.debug("compiling, since %s: %s", kept, reason)
    image = _compile_apart(text, functions, defines, structs, inner)
    try:
        _write(kept, image)
    except (OSError, ValueError) as failure:  # a read-only or full disk: the next start compiles again
        _log.debug("%s is not kept: %s", kept, failure)
    return image


def _compile_apart(
    text: str, functions: Iterable[str], defines: Mapping[str, str], structs: str | None, inner: Mapping[str, str]
) -> Image:
    """Compile in a process of its own: LLVM's memory goes with it, and some of LLVM's errors end a process."""
    import msgpack

    with loader.header_tree(structs) as (prelude, tree):
        command, pipe = child.command(_CHILD, tree or ""), subprocess.PIPE
        # A session of its own: the terminal's Ctrl-C is ours to answer. In /: our directory may have gone.
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, cwd="/") as run:
            request = (prelude + text, functions, dict(defines), dict(inner))
            answer, said = run.communicate(msgpack.packb(request))
    log = said.decode(errors="replace")
    if run.returncode:
        raise loader.CompileFailed(f"the compiler of our BPF programs ended with status {run.returncode}", log)
    image, failed, cause, hint = msgpack.unpackb(answer)
    if failed:
        raise loader.CompileFailed(cause, log)
    if cause:
        raise EnvironmentUnfit(cause, hint)
    return Image.unpack(image)


def compile_for(tree: str) -> None:
    """The other side of `_compile_apart`."""
    import msgpack

    try:
        text, functions, defines, inner = msgpack.unpackb(sys.stdin.buffer.read())
        image = image_of(loader.compile_aloud(text, defines, tree or None), functions, inner)
        answer = (image.pack(), False, "", "")
    except EnvironmentUnfit as failure:
        answer = (b"", isinstance(failure, loader.CompileFailed), failure.cause, failure.hint)
    finally:
        if tree:  # the other side does so too, unless it was killed meanwhile
            shutil.rmtree(tree)
    sys.stdout.buffer.write(msgpack.packb(answer))


def _compiler() -> tuple[str, int]:
    """What tells one BCC from another, without importing it: where it is, and of when."""
    found = importlib.util.find_spec("bcc")
    where = found.origin if found else None
    return (where, Path(where).stat().st_mtime_ns) if where else ("", 0)


def _trust(directory: Path) -> None:
    """Raises OSError or ValueError unless nobody else can have written there."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ValueError(f"{directory} is not ours alone")


def _read(path: Path) -> Image:
    """Raises OSError or ValueError: not there, not whole, or not certainly made by this user."""
    _trust(path.parent)
    image = Image.unpack(path.read_bytes())
    os.utime(path)  # used: it stays
    return image


def _write(path: Path, image: Image) -> None:
    """Raises OSError or ValueError, as where others may write."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _trust(path.parent)
    descriptor, beside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(image.pack())
        Path(beside).replace(path)
    finally:
        Path(beside).unlink(missing_ok=True)
    for each in sorted(path.parent.iterdir(), key=_used, reverse=True)[_KEPT:]:
        with suppress(OSError):  # another run removes it too, or it is no file and not ours
            each.unlink()


def _used(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def make_maps(image: Image, stack: ExitStack, like: Mapping[str, int]) -> dict[str, int]:
    """New maps, which *stack* closes: name to descriptor. Raises OSError.

    *like*: name of an inner map to the descriptor of a map that those in a map of maps are like, instead of it.
    """
    with suppress(OSError, ValueError):  # before Linux 5.11 maps count as locked memory; without the right they may fit
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found: dict[str, int] = {}
    for name, each in sorted(image.maps.items(), key=lambda pair: bool(pair[1].inner)):
        found[name] = syscall.map_create(
            each.type,
            each.key_size,
            each.value_size,
            each.max_entries,
            name=name,
            flags=each.flags,
            inner=(like.get(each.inner) or found[each.inner]) if each.inner else 0,
        )
        stack.callback(os.close, found[name])
    return found
