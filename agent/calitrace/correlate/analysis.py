"""A journal, live or read back, to journeys and verdicts: the same line for both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calitrace.correlate import advice, walk
from calitrace.correlate.drops import Names
from calitrace.correlate.journey import Journey, Journeys
from calitrace.correlate.verdict import Verdict, judge
from calitrace.decode import Decoder
from calitrace.errors import Malformed
from calitrace.journal import typed
from calitrace.model import Outcome, Probe, Topology, require_types

if TYPE_CHECKING:
    from collections import Counter

    from calitrace.journal import Journal


@dataclass(frozen=True)
class Analysis:
    """What a journal shows. *lost*: events lost in the ring; *notes*: what else the reader must know."""

    topology: Topology
    names: Names
    journeys: list[Journey]
    verdicts: list[Verdict]
    lost: int
    outside: int
    malformed: Counter[str]
    notes: tuple[str, ...]


def analyse(journal: Journal, *, short_names: bool = False) -> Analysis:
    """Decode, join and judge. *short_names*: without the prefix that all namespaces share.

    Raises Malformed when the header or the probes are not what the schema says.
    """
    header = journal.header
    try:
        whole = Topology.from_map(header["topology"])
        names = Names(
            typed(header["drop_reasons"], int, str), journal.symbols, typed(header.get("rules", {}), int, str)
        )
        run_id, vxlan_port = int(header["run_id"]), int(header["vxlan_port"])
        probes = [_probe(each) for _, each in sorted(journal.probes.items())]
        lost_by = dict(journal.totals.get("lost", {}))
        lost = sum(lost_by.values())
        changed = frozenset(map(int, journal.totals.get("changed", ())))
        notes = [f"warning: {each}" for each in header.get("warnings", [])]
        host, files = str(header.get("node", "")), [str(each) for each in header.get("policy_files", [])]
        walks = {netns: [_looked_up(each) for each in steps] for netns, steps in journal.walks.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as wrong:
        raise Malformed(0, "a complete header", f"{type(wrong).__name__} {wrong}", "journal") from wrong
    topology = whole.shortened() if short_names else whole
    decoder = Decoder(vxlan_port)
    journeys = Journeys(run_id, probes, topology)
    for event in decoder.iter_events(journal.events):
        journeys.feed(event)
    numbers = {name: number for number, name in names.drop_reasons.items()}
    otherhost = numbers.get("SKB_DROP_REASON_OTHERHOST")
    found = [each.without_flooded(otherhost) for each in journeys.journeys.values()]
    verdicts = [judge(each, topology, names, lost, walks, cut=not journal.complete, changed=changed) for each in found]
    at = {topology.namespaces[inum].name: each for inum, each in whole.namespaces.items()}
    places = [at.get(each.place.namespace) if each.place else None for each in verdicts]
    return Analysis(
        topology,
        names,
        found,
        [
            replace(verdict, next=advice.command(journey, verdict, place, host, files))
            for journey, verdict, place in zip(found, verdicts, places, strict=True)
        ],
        lost,
        journeys.outside,
        decoder.malformed,
        tuple(notes + _notes(journal, decoder.malformed, lost_by)),
    )


def _looked_up(plain: dict[str, Any]) -> walk.Step:
    require_types(walk.Step, plain)
    return walk.Step(**plain)


def _probe(plain: dict[str, Any]) -> Probe:
    require_types(Probe, plain)
    return Probe(**{**plain, "outcome": Outcome(plain["outcome"])})


def _notes(journal: Journal, malformed: Counter[str], lost: dict[str, int]) -> list[str]:
    notes = []
    if journal.gap:
        notes.append(f"the journal {journal.gap}")
    notes += [f"{number} frames of unknown kind {kind!r}" for kind, number in journal.unknown.items()]
    notes += [f"{number} events not decoded: {what}" for what, number in malformed.items()]
    notes += [f"{number} {what} events lost" for what, number in lost.items() if number]
    return notes
