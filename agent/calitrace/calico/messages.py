"""STUB to be replaced."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    name: str
    stage: str
    template: str
    meaning: str
    since: str = "v3.13"
    until: str = ""
    tagged: bool = True
    cause: str = ""


DROP_LINES = (
    ("DENY due to policy", "denied by policy"),
    ("Packet is from an unauthorised source", "the source is not in the service's source ranges"),
    ("missing rt found for", "the backend is not in Calico's routes map"),
)
_ONE = {c: Message(c or "any", "x", "", "", cause=c) for c in ("",) + tuple(c for _, c in DROP_LINES)}


def classify(text):
    for start, cause in DROP_LINES:
        if text.startswith(start):
            return _ONE[cause]
    return _ONE[""]


def classify_untagged(text):
    if text.startswith(("No metadata", "Received metadata", "tc_preamble", "Main program")):
        return _ONE[""]
    return None


def pattern(message):
    return re.compile("")
