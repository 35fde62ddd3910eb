"""What Calico's maps say about one of its drops, when they are read soon after it.

That is weaker than what was recorded with the drop: maps change, and counters count other packets too. So it stands
beside a recorded cause and says where the two disagree; it gives a cause only where none was recorded, as likely.
Counters: felix/bpf-gpl/counters.h, v3.26 to master; a drop that no counter counts is one of Calico's silent ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from calitrace.calico import reasons
from calitrace.correlate import walk
from calitrace.correlate.drops import Confidence
from calitrace.errors import Malformed
from calitrace.model import require_types

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calitrace.correlate.drops import Cause

# What Calico drops without a reason and without counting it.
_SILENT = {walk.SPOOFED, walk.NO_POLICY, walk.NO_INTERFACE}


@dataclass(frozen=True)
class Statement:
    """What was read. *counters*: of the drop's interface and hook, by how much each rose in *over_s* seconds around it.

    None: they were not read, or have no row for these (*has_row*). *steps*: the lookups for this packet, as ``walk``
    gives them; none: they were not made. *back*: by which other interface the kernel routes packets to the source of a
    packet that came in by a host interface. *arrays*: how many programs stand in each array of Calico's programs.
    """

    counters: Mapping[str, int] | None = None
    over_s: float = 0.0
    has_row: bool = True
    steps: tuple[walk.Step, ...] = field(default=())
    back: str = ""
    arrays: Mapping[str, int] = field(default_factory=dict)

    def to_map(self) -> dict[str, Any]:
        """For a journal."""
        return asdict(self)

    @classmethod
    def from_map(cls, plain: Mapping[str, Any]) -> Statement:
        """From a journal. Raises Malformed."""
        try:
            require_types(cls, plain)
            if not all(isinstance(each, int) for each in (plain["counters"] or {}).values()):
                raise TypeError("counters that are no numbers")
            return cls(**{**plain, "steps": tuple(walk.Step(**each) for each in plain["steps"])})
        except (AttributeError, KeyError, TypeError) as wrong:
            raise Malformed(0, "what maps said about a drop", str(wrong), "journal") from wrong


def weigh(cause: Cause, said: Statement) -> Cause:
    """The cause with what the maps said."""
    evidence = []
    found: tuple[str, str, str] | None = None  # source, Calico's reason, in words
    if said.counters is not None:
        rose = {name: by for name, by in said.counters.items() if name in reasons.DROPS and by > 0}
        both = {reasons.NOT_CREATED} if reasons.COLLISION in rose else set()
        shown = ", ".join(f"{name} +{by}" for name, by in rose.items()) or "none of its drops"
        evidence.append(f"Calico's counters of this hook rose within {said.over_s:.1f} s: {shown}")
        if cause.calico_reason in reasons.DROPS and cause.calico_reason in said.counters.keys() - rose.keys():
            evidence.append(f"the counters disagree: {cause.calico_reason} did not rise")
        if said.counters.get(reasons.TOTAL) == 0 and not {"log", "state"} & set(cause.sources):
            empty = [name for name, programs in said.arrays.items() if not programs]
            why = f"no program is in {', '.join(empty)}" if empty else "its place in the array of programs is empty"
            evidence.append("Calico's count of all packets at this hook did not rise: its main program did not run")
            found = ("counters", "", f"its main program did not run: {why}")
        elif len(names := rose.keys() - both) == 1 and not cause.reasonless:
            (name,) = names
            found = ("counters", name, reasons.MEANING[name])
    elif not said.has_row:
        evidence.append("Calico's counters have no row for this interface and hook: its programs drop everything here")
        found = ("counters", "", "no row for this interface and hook in Calico's counters")
    broken = [step for step in said.steps if step.broken]
    for step in broken or said.steps[-1:]:
        evidence.append(f"Calico's maps now: {step}")
    silent = next((step for step in broken if step.broken in _SILENT), None)
    if found is None and silent is not None:
        found = ("maps", "", f"{silent.broken}: {silent.key}: {silent.found}")
    if said.back:
        evidence.append(f"packets to its source leave by {said.back}, as the kernel's routes are now")
        found = found or ("routes", "", f"reverse path: its source is routed by {said.back}")
    cause = replace(cause, evidence=(*cause.evidence, *evidence))
    if cause.recorded or found is None:
        return cause
    source, reason, detail = found
    return replace(
        cause,
        text=f"dropped by Calico, it seems: {detail}",
        detail=detail,
        confidence=Confidence.LIKELY,
        calico_reason=reason,
        sources=(*(each for each in cause.sources if each != "hook"), source),
    )
