"""Felix's policy debug files: which rule a rule id stands for.

Felix writes one JSON file per interface and hook (``/var/run/calico/bpf/policy/*.json``, needs
bpfPolicyDebugEnabled, since v3.24): the policy program's instructions, some with comments. Those that we read:
``Start of policy NAME`` (newer: ``Start of KIND NAME ID``), ``Start of rule TEXT``, ``Rule MatchID: DECIMAL``.
Source: calico felix/bpf/types.go (PolicyDebugInfo), felix/bpf/polprog/pol_prog_builder.go.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from calitrace.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterator

_MATCH_ID = re.compile(r"Rule MatchID:\s*(0x[0-9a-fA-F]+|\d+)")
_START = re.compile(r"Start of (?P<kind>\S+)\s*(?P<rest>.*)", re.DOTALL)
_ACTION = re.compile(r'action:\s*"(?P<action>\w+)"', re.IGNORECASE)


def rule_names(raw: bytes) -> dict[int, str]:
    """Rule id to ``POLICY rule N (action)``. *raw*: one file. Raises Malformed when it is not such a file."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as wrong:
        raise Malformed(0, "JSON", str(wrong), "policy debug file") from wrong
    if not isinstance(document, dict):
        raise Malformed(0, "an object", type(document).__name__, "policy debug file")
    names: dict[int, str] = {}
    policy, rule, number = "", "", -1
    for comment in _iter_comments(document):
        if found := _START.match(comment):
            if found["kind"] == "rule":
                rule, number = found["rest"], number + 1
            elif found["kind"] != "tier":
                policy, rule, number = f"{found['kind']} {found['rest']}".strip(), "", -1
        elif found := _MATCH_ID.match(comment):
            action = _ACTION.search(rule)
            shown = f"{policy.removeprefix('policy ')} rule {max(number, 0)}"
            names[int(found[1], 0)] = f"{shown} ({action['action'].lower()})" if action else shown
    return names


def _iter_comments(document: dict[str, Any]) -> Iterator[str]:
    instructions = document.get("policyInfo")
    for instruction in instructions if isinstance(instructions, list) else ():
        if isinstance(instruction, dict):
            for key, value in instruction.items():
                if key.lower() == "comments" and isinstance(value, list):
                    yield from (each for each in value if isinstance(each, str))
