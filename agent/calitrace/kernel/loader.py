"""Compile BPF C with BCC, with headers made from BTF.

BCC is imported inside the functions that need it: it brings LLVM.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import headers, syscall

_TREE = "calitrace-headers-"
_ABANDONED_S = 600  # compiling takes seconds
_REAL_HEADERS = """\
#include <linux/skbuff.h>
#include <linux/netdevice.h>
#include <net/net_namespace.h>
"""


class CompileFailed(EnvironmentUnfit):
    """Clang or the verifier refused a program. *log*: what they printed."""

    def __init__(self, cause: str, log: str = "") -> None:
        super().__init__(cause, "run again with --debug for the compiler's or verifier's log")
        self.log = log


def bpf_dir() -> Path:
    """The directory with our BPF sources: inside the installed package, or beside agent/ in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "bpf", package.parent.parent / "bpf"):
        if candidate.is_dir():
            return candidate
    raise EnvironmentUnfit(
        f"BPF sources not found below {package}",
        "reinstall calitrace, or run it from a full checkout",
    )


def bpf_source(relative: str) -> str:
    """The text of a file below bpf/."""
    return (bpf_dir() / relative).read_text()


def compile_bpf(text: str, *, defines: Mapping[str, str] = {}) -> Any:
    """Compile *text* and load its maps; returns a ``bcc.BPF`` whose programs are not yet loaded.

    *defines*: macros. Raises CompileFailed with clang's output, EnvironmentUnfit without BCC, without BTF and headers,
    and without the privilege.
    """
    require_privilege()
    types = headers.kernel_btf()
    structs = headers.structs_from(types).structs if types else None
    try:
        with header_tree(structs) as (prelude, tree), captured_stderr() as log:
            return compile_aloud(prelude + text, defines, tree)
    except CompileFailed as failure:
        failure.log = log.text
        raise


@contextmanager
def header_tree(structs: str | None) -> Iterator[tuple[str, str | None]]:
    """What to put before a program, and the directory with the headers to compile it with; None: the kernel's own.

    *structs*: what `headers.structs_from` makes of BTF; None without BTF. Raises EnvironmentUnfit.
    """
    if structs is None:
        _require_real_headers()
        yield _REAL_HEADERS, None
        return
    try:
        _remove_abandoned()
    except FileNotFoundError:  # as of a container whose root may not be written
        raise EnvironmentUnfit("there is no place for temporary files", "set TMPDIR to a directory") from None
    with tempfile.TemporaryDirectory(prefix=_TREE) as directory:
        uname = os.uname()
        headers.write_tree(Path(directory), uname.machine, uname.release)
        yield structs, directory


def compile_aloud(text: str, defines: Mapping[str, str], tree: str | None) -> Any:
    """As compile_bpf, in a `header_tree`; what clang and LLVM say goes to stderr, and not into the error."""
    try:
        from bcc import BPF
    except ImportError:
        raise EnvironmentUnfit(
            f"the Python module bcc is not there for {sys.executable}",
            "install python3-bpfcc and run calitrace from an environment made with --system-site-packages",
        ) from None
    cflags = [f"-D{name}={value}" for name, value in defines.items()]
    cflags += ["-Wno-unused-function", "-Wno-gnu-variable-sized-type-not-at-end"]
    with _environment("BCC_KERNEL_SOURCE", tree):
        try:
            return BPF(text=text.encode(), cflags=cflags)
        except Exception as failure:  # BCC raises bare Exception
            raise CompileFailed(f"cannot compile our BPF programs: {str(failure) or 'clang failed'}") from failure


def _remove_abandoned() -> None:
    """Remove our header directories that nobody will: who made them was killed while compiling."""
    oldest = time.time() - _ABANDONED_S
    for each in Path(tempfile.gettempdir()).glob(f"{_TREE}*"):
        with suppress(OSError):  # another run of ours removes it too
            about = each.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and about.st_mtime < oldest:
                shutil.rmtree(each)


def require_privilege() -> None:
    """Raises EnvironmentUnfit when we may not load programs."""
    held = syscall.capabilities()
    if not held["CAP_SYS_ADMIN"] and not held["CAP_BPF"]:
        raise EnvironmentUnfit("no permission to load BPF programs", "run as root")


def _require_real_headers() -> None:
    build = Path("/lib/modules") / os.uname().release / "build"
    if not build.exists() and not Path("/sys/kernel/kheaders.tar.xz").exists():
        raise EnvironmentUnfit(
            "this kernel offers neither BTF (/sys/kernel/btf/vmlinux) nor headers",
            f"install the headers of {os.uname().release}, or a kernel with CONFIG_DEBUG_INFO_BTF",
        )


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    if value is None:
        yield
        return
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Log:
    text = ""


@contextmanager
def captured_stderr() -> Iterator[_Log]:
    """Keep what C libraries (clang, libbpf) write to file descriptor 2; ``.text`` holds it afterwards."""
    log = _Log()
    sys.stderr.flush()
    with os.fdopen(os.memfd_create("stderr"), "w+b") as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            log.text = sink.read().decode(errors="replace")
