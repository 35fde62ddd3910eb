"""The dozen tiny headers with which BCC compiles on a node that has no kernel headers.

BCC insists on a kernel source tree. The tree written here holds the basic typedefs, and the structs our
programs read, with each member at the offset that the running kernel's BTF gives. Compile, verify and attach
take a fraction of what they take with real headers, which remain the fallback for kernels without BTF.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from calitrace import btf
from calitrace.btf import Btf
from calitrace.errors import EnvironmentUnfit

BTF_PATH = Path("/sys/kernel/btf/vmlinux")

# What our programs read. A member that this kernel lacks is left out and its HAVE_ macro not defined.
STRUCTS: dict[str, tuple[str, ...]] = {
    "ns_common": ("inum",),
    "net": ("ns",),
    "task_struct": ("comm",),
    "net_device": ("name", "ifindex", "nd_net", "hard_header_len"),
    "sk_buff": (
        "dev",
        "len",
        "data_len",
        "mac_len",
        "skb_iif",
        "mark",
        "protocol",
        "network_header",
        "mac_header",
        "head",
        "data",
    ),
}

_KCONFIG = """\
#pragma once
typedef signed char __s8; typedef unsigned char __u8; typedef short __s16; typedef unsigned short __u16;
typedef int __s32; typedef unsigned int __u32; typedef long long __s64; typedef unsigned long long __u64;
typedef __s8 s8; typedef __u8 u8; typedef __s16 s16; typedef __u16 u16;
typedef __s32 s32; typedef __u32 u32; typedef __s64 s64; typedef __u64 u64;
typedef __u16 __be16; typedef __u32 __be32; typedef __u64 __be64; typedef __u16 __le16; typedef __u32 __le32;
typedef __u32 __wsum; typedef __u16 __sum16; typedef unsigned long size_t; typedef long ssize_t;
typedef int pid_t; typedef _Bool bool; typedef unsigned int uint; typedef unsigned long uintptr_t;
typedef unsigned short umode_t; typedef long long loff_t;
typedef __u64 __aligned_u64 __attribute__((aligned(8)));
#define NULL ((void *)0)
#define __always_inline inline __attribute__((always_inline))
#define __packed __attribute__((packed))
#define __user
#define __aligned(x) __attribute__((aligned(x)))
#define CONFIG_BPF_SYSCALL 1
enum skb_drop_reason { SKB_DROP_REASON_PLACEHOLDER };
"""
# BCC's own headers want pt_regs to exist; no program of ours reads a register.
_PT_REGS = {
    "x86_64": "struct pt_regs { unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx,"
    " si, di, orig_ax, ip, cs, flags, sp, ss; };\n",
    "aarch64": "struct user_pt_regs { __u64 regs[31], sp, pc, pstate; };\n"
    "struct pt_regs { __u64 regs[31], sp, pc, pstate; };\n",
}
_EMPTY = (
    "linux/types.h",
    "linux/log2.h",
    "linux/ptrace.h",
    "uapi/linux/bpf.h",
    "uapi/linux/if_packet.h",
    "uapi/linux/ptrace.h",
)


@dataclass(frozen=True)
class Generated:
    """*structs*: C text to put before a program. *missing*: wanted members this kernel does not have."""

    structs: str
    missing: tuple[str, ...]


def kernel_btf() -> Btf | None:
    """The running kernel's types, or None when it was built without BTF or hides it."""
    try:
        return Btf(BTF_PATH.read_bytes())
    except OSError:
        return None


def structs_from(types: Btf) -> Generated:
    """C declarations of STRUCTS with each member at its true offset, and HAVE_<STRUCT>_<MEMBER> macros."""
    out, missing = [], []
    for name, wanted in STRUCTS.items():
        type_id = types.find(name, btf.KIND_STRUCT)
        if type_id is None:
            missing.append(f"struct {name}")
            continue
        members = {member.name: member for member in types.iter_flat(type_id)}
        body, at = [], 0
        for member in sorted((members[w] for w in wanted if w in members), key=lambda m: m.offset_bits):
            if member.offset > at:
                body.append(f"char _pad{at}[{member.offset - at}];")
            body.append(_declare(types, member.type_id, member.name))
            at = member.offset + types.size(member.type_id)
            out.append(f"#define HAVE_{name.upper()}_{member.name.upper()} 1")
        missing += [f"{name}.{w}" for w in wanted if w not in members]
        size = types.size(type_id)
        if name == "sk_buff" and size > at:  # read whole, in one go: the others are far too large
            body.append(f"char _pad{at}[{size - at}];")
        out.append(f"struct {name} {{ {' '.join(body)} }};")
    return Generated("\n".join(out) + "\n", tuple(missing))


def _declare(types: Btf, type_id: int, name: str) -> str:
    inner = types.resolve(type_id)
    kind = types.kind(inner)
    if kind == btf.KIND_PTR:
        return f"{types.spelling(inner)}{name};" if _is_struct_pointer(types, inner) else f"void *{name};"
    if kind == btf.KIND_STRUCT:
        if types.name(inner) in STRUCTS:
            tail = types.size(inner) - _declared_size(types, inner)
            pad = f" char _tail_{name}[{tail}];" if tail else ""
            return f"struct {types.name(inner)} {name};{pad}"
        fields = " ".join(_declare(types, m.type_id, m.name) for m in types.members(inner))
        return f"struct {{ {fields} }} {name};"
    if kind == btf.KIND_ARRAY:
        return f"u8 {name}[{types.size(inner)}];"
    return f"u{8 * types.size(inner)} {name};"


def _declared_size(types: Btf, struct_id: int) -> int:
    """Bytes of a struct as structs_from() writes it: up to its last wanted member, aligned."""
    members = {member.name: member for member in types.iter_flat(struct_id)}
    wanted = [members[w] for w in STRUCTS[types.name(struct_id)] if w in members]
    end = max(m.offset + types.size(m.type_id) for m in wanted)
    align = max(min(types.size(m.type_id), 8) for m in wanted)
    return (end + align - 1) // align * align


def _is_struct_pointer(types: Btf, pointer: int) -> bool:
    return types.kind(types.resolve(types.target(pointer))) == btf.KIND_STRUCT


def write_tree(directory: Path, machine: str, release: str) -> None:
    """Write the include tree. *machine*, *release*: as uname(2) gives them.

    Raises EnvironmentUnfit on a machine for which we have no pt_regs.
    """
    if machine not in _PT_REGS:
        raise EnvironmentUnfit(
            f"calitrace has no BCC prelude for {machine}",
            "Calico's eBPF mode runs on amd64 and arm64",
        )
    major, minor, patch = version(release)
    include = directory / "include"
    files = {
        "linux/kconfig.h": _KCONFIG + _PT_REGS[machine],
        "linux/version.h": "#pragma once\n#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))\n"
        f"#define LINUX_VERSION_CODE {(major << 16) + (minor << 8) + min(patch, 255)}\n",
        "asm/page.h": f"#pragma once\n#define PAGE_SIZE {os.sysconf('SC_PAGE_SIZE')}\n",
        "linux/bpf_common.h": "#pragma once\n#define BPF_CLASS(code) ((code) & 0x07)\n",
        **dict.fromkeys(_EMPTY, "#pragma once\n"),
    }
    for name, text in files.items():
        target = include / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def version(release: str) -> tuple[int, int, int]:
    """(6, 18, 44) of "6.18.44-generic"; missing parts are 0."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if not found:
        raise EnvironmentUnfit(f"kernel release {release!r} does not begin with a version")
    return int(found[1]), int(found[2]), int(found[3] or 0)
