"""Programs that were compiled before behave the same without a compiler, and what is kept is not believed blindly."""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import pytest

from calitrace.errors import EnvironmentUnfit
from calitrace.events import Stat
from calitrace.kernel import headers, images, loader
from calitrace.kernel.collectors import Collectors, Plan
from calitrace.model import Hop
from tests.kernel.test_collectors import collect, send_udp

if TYPE_CHECKING:
    from tests.kernel.conftest import Pair

pytestmark = pytest.mark.root
RUNS = (0x5EED1234, 0xFFFFFFFF)


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache of this test's own; grows with each compilation."""
    done: list[str] = []
    compile_apart = images._compile_apart

    def counted(text: str, *further: Any) -> images.Image:
        done.append(text)
        return compile_apart(text, *further)

    monkeypatch.setattr(images, "_compile_apart", counted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(images, "CACHE", tmp_path / "cache")
    return done


def hops(pair: Pair, run_id: int, plan: Plan) -> int:
    """Hops of one datagram of this run, as the collectors see them."""
    with Collectors(plan) as collectors:
        send_udp(pair, 1, run_id=run_id)
        found = [each for each in collect(collectors) if isinstance(each, Hop)]
        assert collectors.stats()[Stat.HOP_SEEN] > 0
    return len(found)


def test_what_one_run_compiled_serves_the_others(pair: Pair, compilations: list[str]) -> None:
    for run_id in RUNS:
        assert hops(pair, run_id, Plan(run_id=run_id)) >= 3
        assert hops(pair, run_id ^ 1, Plan(run_id=run_id)) == 0
        client = (pair.left_ip, 1, 65535)
        assert hops(pair, run_id ^ 1, Plan(run_id=run_id, client=client)) >= 3
        assert hops(pair, run_id ^ 1, Plan(run_id=run_id, client=("198.51.100.1", 1, 65535))) == 0
    assert len(compilations) == 2  # with a client and without
    assert len(list(images.CACHE.iterdir())) == 2


def test_what_is_kept_must_be_whole_and_ours(pair: Pair, compilations: list[str]) -> None:
    plan = Plan(run_id=RUNS[0], log="", drop=False)
    assert hops(pair, RUNS[0], plan)
    (kept,) = images.CACHE.iterdir()
    whole = kept.read_bytes()
    assert images.Image.unpack(whole).pack() == whole
    for broken in (b"", whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        kept.write_bytes(broken)
        before = len(compilations)
        assert hops(pair, RUNS[0], plan)
        assert len(compilations) == before + 1
        assert kept.read_bytes() == whole
    form = images.Image.unpack(whole)
    others: tuple[object, ...] = (({"a": (1,)}, {}), ((), ()), 7)
    for changed in others:
        body = msgpack.packb(changed)
        with pytest.raises(ValueError, match="another form"):
            images.Image.unpack(hashlib.sha256(body).digest() + body)
    assert form.functions.keys() == {"collect_hop", "collect_xmit"}


@pytest.mark.parametrize("owner", [(0o777, 0), (0o700, 65534)], ids=["mode", "owner"])
def test_nothing_is_read_or_written_where_others_may_write(
    pair: Pair, compilations: list[str], owner: tuple[int, int]
) -> None:
    images.CACHE.mkdir()
    images.CACHE.chmod(owner[0])
    os.chown(images.CACHE, owner[1], owner[1])
    for number in (1, 2):
        assert hops(pair, RUNS[0], Plan(run_id=RUNS[0], log="", drop=False))
        assert len(compilations) == number
    assert not list(images.CACHE.iterdir())


def test_a_disk_that_takes_nothing_costs_time_only(
    pair: Pair, compilations: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(images, "CACHE", tmp_path / "file" / "cache")
    for _ in range(2):
        assert hops(pair, RUNS[0], Plan(run_id=RUNS[0], log="", drop=False))
    assert len(compilations) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int f(void *context) { return undeclared; }", "undeclared"),
        # LLVM knows no such call for BPF. LLVM 14 ends the process there, without an exception.
        ("int f(u64 *context) { char a[64]; __builtin_memset(a, 0, *context & 63); return a[7]; }", "memset"),
    ],
    ids=["clang", "llvm"],
)
def test_a_compiler_that_gives_up(compilations: list[str], text: str, said: str) -> None:
    with pytest.raises(loader.CompileFailed, match="BPF programs") as failure:
        images.compiled(text, ["f"], defines={}, types=headers.kernel_btf(), inner={})
    assert said in failure.value.log
    assert len(compilations) == 1
    assert not list(images.CACHE.parent.iterdir())


def test_a_module_anywhere_in_memory() -> None:
    """Debian's Python has its heap below 4 GB, others have not; nor has a thread."""
    code = (
        "from threading import Thread\n"
        "from calitrace.kernel import images, loader\n"
        "def compiled():\n"
        "    bpf = loader.compile_bpf('BPF_ARRAY(found, u64, 1); int f(void *context) { return 0; }')\n"
        "    print(bpf.module > 2**32, *images.image_of(bpf, ['f'], {}).maps)\n"
        "thread = Thread(target=compiled)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True found\n"), done.stderr


def test_killed_while_compiling_nothing_is_left(tmp_path: Path) -> None:
    code = (
        "import pathlib; from calitrace.kernel import images; from calitrace.kernel.collectors import *\n"
        f"images.CACHE = pathlib.Path({str(tmp_path / 'cache')!r})\n"
        "Collectors(Plan(run_id=1)).__enter__()\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    children: list[str] = []
    while not children or not list(tmp_path.glob("calitrace-headers-*/include")):
        assert agent.poll() is None
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    compiler = os.pidfd_open(int(children[0]))
    agent.kill()
    agent.wait()
    assert select.select([compiler], [], [], 60)[0]  # it has ended
    os.close(compiler)
    assert not list(tmp_path.iterdir())


def test_neither_bcc_nor_a_module_from_the_working_directory(
    compilations: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("bcc", "json", "msgpack"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    first = tmp_path / "first"
    first.mkdir()
    (first / "bcc.py").write_text("raise ImportError")
    monkeypatch.setattr(sys, "path", [str(first), *sys.path])
    with pytest.raises(EnvironmentUnfit, match="module bcc is not there") as failure:
        images.compiled("int f(void *context) { return 0; }", ["f"], defines={}, types=headers.kernel_btf(), inner={})
    assert not isinstance(failure.value, loader.CompileFailed)
    assert "python3-bpfcc" in failure.value.hint
    assert len(compilations) == 1


def test_a_working_directory_that_was_removed(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    text = "int f(void *context) { return 0; }"
    assert images.compiled(text, ["f"], defines={}, types=headers.kernel_btf(), inner={}).functions["f"].code
    assert len(compilations) == 1


def test_only_the_images_that_were_used_last_stay(pair: Pair, compilations: list[str]) -> None:
    images.CACHE.mkdir()
    for number in range(images._KEPT + 3):
        old = images.CACHE / str(number)
        old.touch()
        os.utime(old, (number, number))
    assert hops(pair, RUNS[0], Plan(run_id=RUNS[0], log="", drop=False))
    kept = {each.name for each in images.CACHE.iterdir()}
    assert len(kept) == images._KEPT
    assert len(compilations) == 1
    assert not kept & {"0", "1", "2", "3"}
