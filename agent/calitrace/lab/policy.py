"""The lab's policy rules, and the debug files in which Felix would name them.

Felix numbers a rule by hashing its NFLOG prefix (`DPI0|default.deny-probes`: action, Policy, direction, index,
name) with 64-bit FNV-1a, and writes the policy program's instructions with comments to
`IFACE_DIRECTION_v4.json`, so that an id in Calico's state leads back to a name.
Source: calico felix/rules/nflog.go, felix/bpf/types.go (PolicyDebugInfo), felix/bpf/asm/asm.go (Insn),
felix/bpf/polprog/pol_prog_builder.go (comments), master.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calitrace.lab.topology import NODES

if TYPE_CHECKING:
    from calitrace.lab.topology import Lab

_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
_TIER = "default"
_EXIT = [0x95, 0, 0, 0, 0, 0, 0, 0]  # BPF_EXIT: carries the comments


@dataclass(frozen=True)
class Rule:
    """A rule of a workload's policy. *direction*: Calico's, ``ingress`` is towards the pod."""

    policy: str
    action: str
    direction: str
    index: int = 0

    @property
    def id(self) -> int:
        """Felix's 64-bit id."""
        prefix = f"{self.action[0].upper()}P{self.direction[0].upper()}{self.index}|{self.policy}"
        value = _FNV_OFFSET
        for byte in prefix.encode():
            value = ((value ^ byte) * _FNV_PRIME) & 0xFFFFFFFFFFFFFFFF
        return value


ALLOW_INGRESS = Rule("default.allow-lab-clients", "allow", "ingress")
ALLOW_EGRESS = Rule("default.allow-lab-clients", "allow", "egress")
DENY_INGRESS = Rule("default.deny-lab-clients", "deny", "ingress")


def write_debug_files(lab: Lab, *, denied: bool) -> None:
    """Write what Felix writes for every workload. *denied*: whether pod-b's policy denies its clients."""
    for node in NODES:
        deny = denied and node.pod == "pod-b"
        for direction, hook, rule in (
            ("ingress", "tc egress", DENY_INGRESS if deny else ALLOW_INGRESS),
            ("egress", "tc ingress", ALLOW_EGRESS),
        ):
            target = lab.policy_directory(node.name) / f"{node.workload}_{direction}_v4.json"
            draft = target.with_suffix(".new")
            draft.write_text(json.dumps(_debug_info(node.workload, hook, rule)) + "\n")
            draft.replace(target)


def _debug_info(interface: str, hook: str, rule: Rule) -> dict[str, Any]:
    comments = [
        f"Start of tier {_TIER}",
        f"Start of policy {rule.policy}",
        f'Start of rule action:"{rule.action}"',
        f"Rule MatchID: {rule.id}",
        "End of rule",
        f"End of policy {rule.policy}",
        f"End of tier {_TIER}: deny",
    ]
    instructions = [{"inst": _EXIT, "comments": comments}]
    return {"ifacename": interface, "hook": hook, "policyInfo": instructions, "error": ""}
