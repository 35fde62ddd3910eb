"""Load the collectors that a plan names, and read their events.

A plan is data; what it becomes is a list of -D options, a list of sources and a list of attachments. All
attachments are raw tracepoints on file descriptors: after kill -9 nothing of them is left.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import struct
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calitrace import btf, identity
from calitrace.errors import EnvironmentUnfit
from calitrace.events import DROP, STATE, STATE_BYTES, HopKind, Stat
from calitrace.kernel import headers, images, loader, maps, syscall
from calitrace.kernel.ring import Ring
from calitrace.model import Cell

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from calitrace.btf import Btf

_log = logging.getLogger(__name__)
_MOST_WAKE_BYTES, _LEAST_WAKE_BYTES = 512 * 1024, 16 * 1024  # of a CPU
RING_BYTES = 4 * 1024 * 1024
RECORDER_LINES = 256
_IFNAMSIZ = 16
_HOP_KIND = 5  # PER_RUN(5) of bpf/include/packet.h
_DROP_SLOTS = 512  # a value of a per-CPU map has at most 32 KiB
# A namespace's state is in the slot of its number, or in the next free one: that takes a tenth of a hash lookup.
_STATE_SLOTS, _STATE_TRIES = 256, 4
_DROP_KEY = struct.Struct("=QIIII")  # struct drop_key of bpf/drop.bpf.c
_DROP_CELL = struct.Struct("=QQIIII")  # struct drop_cell there
_NO_TAG = 0xFFFFFFFF  # a sequence number shifted right is never this
# An array of maps takes maps of one value size: there is one for each size of the plan. They are of bytes for BCC's
# sake, and of words for a copy of 8 bytes at a time. BCC 0.18 cannot name the key in BPF_ARRAY_OF_MAPS.
_STATES_OF_SIZE = """
struct calico_state_{size} {{
\tu8 bytes[{size}];
}};
struct state_words_{size} {{
\tu64 words[{size} / 8];
}};
BPF_TABLE("percpu_array", u32, struct calico_state_{size}, state_template_{size}, 2);
BPF_TABLE("array_of_maps$state_template_{size}", u32, int, states_{size}, STATE_SLOTS);
"""
_FIND_OF_SIZE = """
\tif (*bytes == {size}) {{
\t\tmap = states_{size}.lookup(&slot);
\t\treturn map ? bpf_map_lookup_elem(map, &zero) : NULL;
\t}}
"""
_COPY_OF_SIZE = """
\tif (bytes == {size}) {{
\t\t*(struct state_words_{size} *)to = *(struct state_words_{size} *)state;
\t\t__builtin_memset(to + {size}, 0, STATE_BYTES - {size});
\t}}
"""


@dataclass(frozen=True)
class Program:
    """A function of our sources at a raw tracepoint. *hop*: its HOP_KIND. *typed*: types of arguments are of use."""

    function: str
    tracepoint: str
    hop: int = 0
    typed: bool = True


@dataclass(frozen=True)
class Plan:
    """What to collect, of which packets.

    *run_id*: 32 bits, the identity that our probes carry; 0 matches none. *client*: the probes' source address
    and inclusive port range, which survives NAT and encapsulation. *drop_all*: send every drop, not only the
    run's, but no more than *rate_limit* a second (0: no limit) and one in *sample*; *drop_count_only*: send none.
    *drop_cells*: entries of the table of totals. *netns* (0: any), *named_by* (C, see ``name_condition``; empty: any)
    and *pcap_filter* (C, see ``cbpf``): which drops are sent, of those that *drop_all* sends. *stack*: send the
    kernel's stack with each. *log*: "" for none, "flight" for the lines that led to a probe's event, "stream" for
    all. *state_bytes*: value sizes of Calico's state maps, of which each costs time to compile. *state_like*: ids of
    such maps; of each size the others are like the first: from Linux 5.15 to 6.1 the kernel takes those with BTF and
    those without for unlike. Without one, they must have no BTF there.
    """

    drop: bool = True
    hop: bool = True
    log: str = "flight"
    drop_all: bool = False
    drop_count_only: bool = False
    rate_limit: int = 0
    sample: int = 1
    drop_cells: int = 8192
    netns: int = 0
    named_by: str = ""
    pcap_filter: str = ""
    stack: bool = False
    run_id: int = 0
    client: tuple[str, int, int] | None = None
    vxlan_port: int = 4789
    state_bytes: tuple[int, ...] = (STATE_BYTES,)
    state_like: tuple[int, ...] = ()
    ring_bytes: int = RING_BYTES

    @property
    def drop_slots(self) -> int:
        """Kinds of drops that have a place of their own, not one in the hash of *drop_cells*."""
        return min(self.drop_cells, _DROP_SLOTS)

    @property
    def wake_bytes(self) -> int:
        """What a CPU sends before it wakes the reader: all CPUs together half of the ring, where that is reasonable."""
        share = self.ring_bytes // (2 * syscall.possible_cpus())
        return max(_LEAST_WAKE_BYTES, min(share, _MOST_WAKE_BYTES))

    def sources(self) -> list[str]:
        """Files below bpf/, in the order in which they use each other."""
        files = ["include/events.h", "include/packet.h"]
        files += ["calico_log.bpf.c"] * bool(self.log)
        files += ["drop.bpf.c"] * self.drop
        return files + ["hop.bpf.c"] * self.hop

    def programs(self) -> list[Program]:
        """Those to attach; the log first, so that no line of a seen packet is missed."""
        found = [Program("collect_log", "bpf_trace_printk", typed=False)] * bool(self.log)
        found += [Program("collect_drop", "kfree_skb")] * self.drop
        if self.hop:
            found += [
                Program("collect_hop", "consume_skb", HopKind.CONSUME),
                Program("collect_xmit", "net_dev_xmit"),
                Program("collect_hop", "net_dev_queue", HopKind.QUEUE),
                Program("collect_hop", "netif_receive_skb", HopKind.RECEIVE),
            ]
        return found

    def values(self) -> dict[int, int]:
        """What PER_RUN(n) of bpf/include/packet.h is in this run."""
        address, low, high = self.client or ("0.0.0.0", 0, 0)
        client = int.from_bytes(ipaddress.ip_address(address).packed[:4], sys.byteorder)
        tag = identity.run_tag(self.run_id) if self.run_id else _NO_TAG
        return dict(enumerate((self.run_id, tag, client, low, high)))

    def defines(self, types: Btf | None) -> dict[str, str]:
        """The -D options for a kernel with these types."""
        reasons = types.enum("skb_drop_reason") if types else None
        numbers = {name.removeprefix("SKB_DROP_REASON_"): number for number, name in (reasons or {}).items()}
        flags = {
            "WITH_CLIENT": self.client is not None and ipaddress.ip_address(self.client[0]).version == 4,
            "HAVE_DROP_REASON": has_drop_reason(types),
            "DROP_ALL": self.drop_all,
            "DROP_COUNT_ONLY": self.drop_count_only,
            "PCAP_FILTER": bool(self.pcap_filter),
            "WITH_STACK": self.stack,
            "LOG_STREAM": self.log == "stream",
            "WITH_LOG": self.log == "flight",
        }
        return {
            "MAGIC": f"{identity.MAGIC:#x}u",
            "TAG_SHIFT": str(identity.TAG_SHIFT),
            "VXLAN_PORT": str(self.vxlan_port),
            "RECORDER_LINES": str(RECORDER_LINES),
            "RING_PAGES": str(self.ring_bytes // os.sysconf("SC_PAGE_SIZE")),
            "WAKE_BYTES": str(self.wake_bytes),
            "RATE_LIMIT": str(self.rate_limit),
            "SAMPLE": str(self.sample),
            "STATE_SLOTS": str(_STATE_SLOTS),
            "STATE_TRIES": str(_STATE_TRIES),
            "DROP_CELLS": str(self.drop_cells),
            "DROP_SLOTS": str(self.drop_slots),
            "DROP_TABLE_BYTES": str(self.drop_slots * _DROP_CELL.size),
            **{f"{each}_REASON": f"{numbers[each]}u" for each in ("TC_INGRESS", "TC_EGRESS") if each in numbers},
            **({"NETNS": f"{self.netns}u"} if self.netns else {}),
            **({"NAMED_BY": self.named_by} if self.named_by else {}),
            **{name: "1" for name, on in flags.items() if on},
        }


class Collectors:
    """The loaded collectors of one plan: a context manager; leaving it detaches everything."""

    def __init__(self, plan: Plan, types: Btf | None = None) -> None:
        self.plan = plan
        self._types = types
        self._stack = ExitStack()
        self._maps: dict[str, int] = {}  # descriptors, by name
        self._descriptors: dict[str, int] = {}
        self._owners: dict[int, int] = {}  # slot of a state map to its namespace
        self._attached: list[int] = []  # descriptors of our links

    def __enter__(self) -> Collectors:
        """Compile if nobody did before, verify, attach. Raises EnvironmentUnfit (CompileFailed with the log)."""
        types = self._types or headers.kernel_btf()
        parts = {name: loader.bpf_source(name).replace("#pragma once", "") for name in self.plan.sources()}
        parts["include/packet.h"] += self.plan.pcap_filter + _states(self.plan.state_bytes) * self.plan.drop
        text = "".join(parts.values())
        with self._stack:
            typed = self._load_best(text, types)
            self._ring = Ring(self._maps["events"], syscall.map_info(self._maps["events"]).max_entries)
            self._stack.callback(self._ring.close)
            self._stack.callback(self.stop)
            for program in self.plan.programs():
                name = "" if program.tracepoint in typed else program.tracepoint
                try:
                    self._attached.append(syscall.attach_tracepoint(self._descriptors[program.tracepoint], name))
                except OSError as failure:
                    raise EnvironmentUnfit(
                        f"cannot attach to raw tracepoint {program.tracepoint}: {failure.strerror}",
                        "calitrace doctor names what this costs",
                    ) from failure
            self._stack = self._stack.pop_all()
        return self

    def _btf_ids(self, types: Btf | None) -> dict[str, int]:
        """Ids of the tracepoints whose programs can know their arguments' types; none unless all are there."""
        wanted = [program.tracepoint for program in self.plan.programs() if program.typed]
        found = {name: types.find(f"btf_trace_{name}", btf.KIND_TYPEDEF) if types else None for name in wanted}
        ids = {name: identifier for name, identifier in found.items() if identifier}
        return ids if len(ids) == len(wanted) else {}

    def _load_best(self, text: str, types: Btf | None) -> set[str]:
        """As ``_load``, by the fastest means that this kernel knows and permits."""
        defines, btf_ids = self.plan.defines(types), self._btf_ids(types)
        typed = {"TYPED": "1"} if btf_ids else {}
        functions = _kernel_functions(types)
        reading = {option: each for option, each in functions.items() if not option.startswith("NUM_")}
        ways = [(functions | typed, btf_ids), (reading | typed, btf_ids), (typed, btf_ids)]
        for at, (options, ids) in enumerate(ways):
            if options and (options, ids) not in ways[:at]:
                try:
                    return self._load(text, defines | options, types, ids)
                except loader.CompileFailed as failure:  # as before Linux 5.5, or where such programs are not permitted
                    _log.debug("not with %s: %s\n%s", " ".join(options), failure, failure.log)
        return self._load(text, defines, types, {})

    def _load(self, text: str, defines: dict[str, str], types: Btf | None, btf_ids: Mapping[str, int]) -> set[str]:
        """Make the maps and load the programs; returns the tracepoints where they know the types of their arguments.

        Raises EnvironmentUnfit, and CompileFailed when the compiler or the verifier refuses.
        """
        inner = {f"states_{size}": f"state_template_{size}" for size in self.plan.state_bytes if self.plan.drop}
        programs = self.plan.programs()
        functions = sorted({program.function for program in programs})
        image = images.compiled(text, functions, defines=defines, types=types, inner=inner)
        with ExitStack() as stack:
            try:
                with ExitStack() as for_now:
                    self._maps = images.make_maps(image, stack, self._states_like(for_now))
            except OSError as failure:
                raise EnvironmentUnfit(f"the kernel refuses a BPF map of ours: {failure.strerror}") from failure
            for program in programs:
                values = self.plan.values() | {_HOP_KIND: program.hop}
                code = image.code(program.function, self._maps, values)
                at = program.tracepoint
                try:
                    descriptor = syscall.load_tracepoint(code, program.function, btf_id=btf_ids.get(at, 0))
                except OSError as failure:
                    cause = f"the kernel refuses BPF program {program.function} at {at}"
                    raise loader.CompileFailed(cause, str(failure)) from failure
                stack.callback(os.close, descriptor)
                self._descriptors[at] = descriptor
            self._stack.enter_context(stack.pop_all())
        return set(btf_ids)

    def _states_like(self, stack: ExitStack) -> dict[str, int]:
        """Descriptors of the plan's examples of state maps, which *stack* closes, by the name of ours of that size."""
        found: dict[str, int] = {}
        for identifier in self.plan.state_like:
            try:
                descriptor = syscall.map_fd(identifier)
            except OSError as failure:  # gone, as when Felix replaces its programs; watch_state tells of it
                _log.debug("state map %s: %s", identifier, failure.strerror)
                continue
            stack.callback(os.close, descriptor)
            found.setdefault(f"state_template_{syscall.map_info(descriptor).value_size}", descriptor)
        return found

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stop(self) -> None:
        """Detach: what stands in the ring and in the maps is final, and can still be read."""
        while self._attached:
            os.close(self._attached.pop())

    def watch_state(self, state_maps: Mapping[int, int]) -> dict[int, str]:
        """Read Calico's state at each drop. *state_maps*: namespace inode number to id of its cali_state map, of all.

        Returns why it is not read, by namespace: Felix may have replaced the map since it was looked for.
        """
        unread = {}
        for gone in [slot for slot, owner in self._owners.items() if owner not in state_maps]:
            syscall.map_update(self._maps["state_owners"], gone.to_bytes(4, sys.byteorder), bytes(8))
            del self._owners[gone]
        for netns, identifier in state_maps.items():
            try:
                with ExitStack() as stack:
                    descriptor = syscall.map_fd(identifier)
                    stack.callback(os.close, descriptor)
                    size = syscall.map_info(descriptor).value_size
                    slots = [(netns + each) % _STATE_SLOTS for each in range(_STATE_TRIES)]
                    mine = [each for each in slots if self._owners.get(each) == netns]
                    free = mine + [each for each in slots if each not in self._owners]
                    if size not in self.plan.state_bytes:
                        unread[netns] = "it has another release now: start again"
                    elif not free:
                        unread[netns] = "too many other namespaces have one"
                    else:
                        key, value = (each.to_bytes(4, sys.byteorder) for each in (free[0], descriptor))
                        syscall.map_update(self._maps[f"states_{size}"], key, value)
                        owner = (netns | size << 32).to_bytes(8, sys.byteorder)
                        syscall.map_update(self._maps["state_owners"], key, owner)
                        self._owners[free[0]] = netns
            except FileNotFoundError:
                unread[netns] = "its state map has gone, as when Felix replaces its programs"
            except OSError as failure:
                unread[netns] = f"its state map cannot be read: {failure.strerror}"
                if failure.errno == errno.EINVAL:  # see Plan.state_like
                    unread[netns] = "its state map is unlike those at the start: start again"
        return unread

    def poll(self, timeout_ms: int) -> list[bytes]:
        """Wait until the ring is filling up or *timeout_ms* has passed; returns all events, oldest first."""
        self._ring.wait(timeout_ms)
        return self.drain()

    def drain(self) -> list[bytes]:
        """All events now in the ring, without waiting."""
        return [event for record in self._ring.read() for event in _events_of(record)]

    def stats(self) -> dict[Stat, int]:
        """The exact totals, summed over CPUs."""
        of_cpus = struct.Struct(f"={syscall.possible_cpus()}Q")
        found = {}
        for stat in Stat:
            values = syscall.map_lookup(self._maps["stats"], stat.to_bytes(4, sys.byteorder), of_cpus.size)
            found[stat] = sum(of_cpus.unpack(values or bytes(of_cpus.size)))
        return found

    def drop_counts(self) -> dict[Cell, int]:
        """Number of drops of the whole kernel by what they have in common, summed over CPUs.

        Together with Stat.DROP_OTHER that is all of Stat.DROP_SEEN.
        """
        found: Counter[Cell] = Counter()
        counts = maps.Found("drop_counts", "", None, syscall.map_info(self._maps["drop_counts"]), in_use=True)
        for cell, totals in maps.read(counts).entries:
            found[Cell(*_DROP_KEY.unpack(cell))] += sum(memoryview(totals).cast("Q"))
        size = self.plan.drop_slots * _DROP_CELL.size * syscall.possible_cpus()
        table = syscall.map_lookup(self._maps["drop_tables"], bytes(4), size)
        for drops, *key in _DROP_CELL.iter_unpack(table or b""):
            if drops:
                found[Cell(*key)] += drops
        return found

    def programs(self) -> dict[str, syscall.ProgramInfo]:
        """What the kernel knows about each program, by its tracepoint: run time and count, recursion misses."""
        return {name: syscall.program_info(fd) for name, fd in self._descriptors.items()}


def _events_of(record: bytes) -> tuple[bytes, ...]:
    """What lies in one record of the ring: an event, or a drop and Calico's state (struct drop_with_state)."""
    return (record,) if len(record) != DROP.size + STATE.size else (record[: DROP.size], record[DROP.size :])


def _kernel_functions(types: Btf | None) -> dict[str, str]:
    """The -D options of programs that call functions of this kernel: to read its memory, and to loop."""
    if types is None:
        return {}
    names = {
        "RDONLY_CAST": ("bpf_rdonly_cast", btf.KIND_FUNC),
        "TIMESPEC64": ("timespec64", btf.KIND_STRUCT),
        "NUM_NEW": ("bpf_iter_num_new", btf.KIND_FUNC),
        "NUM_NEXT": ("bpf_iter_num_next", btf.KIND_FUNC),
        "NUM_DESTROY": ("bpf_iter_num_destroy", btf.KIND_FUNC),
    }
    found = {option: types.find(*each) for option, each in names.items()}
    if not found["RDONLY_CAST"]:
        return {}
    return {"KFUNC_CALL": str(images.KFUNC_CALL), **{option: str(each) for option, each in found.items() if each}}


def _states(sizes: Sequence[int]) -> str:
    """C that finds and copies a node's state, whatever of these sizes it has."""
    return "".join(
        (
            *(_STATES_OF_SIZE.format(size=size) for size in sizes),
            """
BPF_ARRAY(state_owners, u64, STATE_SLOTS);

/* The state that Calico has on this CPU in a namespace, and its size; NULL where there is none. */
static __always_inline void *state_of(u32 netns, u32 *bytes)
{
\tu32 zero = 0, slot;
\tu64 *owner;
\tvoid *map;

#pragma unroll
\tfor (int i = 0; i < STATE_TRIES; i++) {
\t\tslot = (netns + i) % STATE_SLOTS;
\t\towner = state_owners.lookup(&slot);
\t\tif (!owner || (u32)*owner == netns)
\t\t\tbreak;
\t}
\tif (!netns || !owner || (u32)*owner != netns)
\t\treturn NULL;
\t*bytes = *owner >> 32;
""",
            *(_FIND_OF_SIZE.format(size=size) for size in sizes),
            """
\treturn NULL;
}
static __always_inline void copy_state(u8 *to, void *state, u32 bytes)
{
""",
            *(_COPY_OF_SIZE.format(size=size) for size in sizes),
            "}\n",
        )
    )


def has_drop_reason(types: Btf | None) -> bool:
    """Whether kfree_skb carries a reason: Linux commit c504e5c2f964 ("net: skb: introduce kfree_skb_reason()")."""
    if types is None:
        return False
    return "enum skb_drop_reason" in (types.parameters("btf_trace_kfree_skb") or [])


def name_condition(patterns: Sequence[str]) -> str:
    """C that holds when the two u64 of ``name``, an interface's, fit one of *patterns*: ``eth0``, ``cali*``.

    Empty when there are none, or when one has other wildcards: then only the reader can tell.
    """
    either = []
    for pattern in patterns:
        literal = os.fsencode(pattern.removesuffix("*"))
        if any(each in b"*?[]" for each in literal) or len(literal) >= _IFNAMSIZ:
            return ""
        wanted, mask = literal, b"\xff" * len(literal)
        if not pattern.endswith("*"):
            mask += b"\xff"  # the NUL behind it
        mask, wanted = mask.ljust(_IFNAMSIZ, b"\0"), wanted.ljust(_IFNAMSIZ, b"\0")
        both = []
        for n in range(2):
            m, w = (int.from_bytes(each[8 * n : 8 * n + 8], sys.byteorder) for each in (mask, wanted))
            both.append(f"(name[{n}]&{m:#x}ULL)=={w:#x}ULL")
        either.append("(" + "&&".join(both) + ")")
    return "||".join(either)
