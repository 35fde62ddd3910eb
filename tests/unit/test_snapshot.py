"""A snapshot comes back from the journal as it went in; anything else is refused, whole."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.node_snapshot import HEALTHY

from calitrace import journal
from calitrace.checks import registry
from calitrace.checks.snapshot import Missing, Snapshot, from_plain, to_plain
from calitrace.errors import Malformed


def through_a_journal(snapshot: Snapshot) -> Snapshot:
    stream = io.BytesIO()
    writer = journal.Writer(stream, {})
    writer.write(journal.SNAPSHOT, to_plain(snapshot))
    writer.write(journal.END, {})
    stream.seek(0)
    found = journal.read(stream)
    assert found.complete
    assert found.snapshot is not None
    return from_plain(found.snapshot)


@pytest.mark.parametrize("snapshot", [HEALTHY, Snapshot(), replace(HEALTHY, maps=Missing("no bpffs"))])
def test_through_a_journal(snapshot: Snapshot) -> None:
    back = through_a_journal(snapshot)
    assert back == snapshot
    assert registry.run(back) == registry.run(snapshot)


def test_a_newer_field_is_left_out_and_an_absent_one_missing() -> None:
    plain = to_plain(HEALTHY) | {"of_the_future": 1}
    del plain["maps"]
    assert from_plain(plain) == replace(HEALTHY, maps=Missing("not collected"))


@pytest.mark.parametrize(
    "change",
    [{"host": 3}, {"links": [{"index": "x"}]}, {"sysctls": []}, {"taken": 1}, {"host": {"odd": 1}}, {"programs": None}],
)
def test_what_is_no_snapshot_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Malformed, match="malformed snapshot"):
        registry.run(from_plain(to_plain(HEALTHY) | change))


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(Snapshot.__dataclass_fields__)), plain_values)
def test_any_bytes_give_a_snapshot_or_malformed(name: str, value: object) -> None:
    try:
        found = from_plain({name: value})
    except Malformed:
        return
    assert isinstance(found, Snapshot)
    assert len(registry.run(found)) == len(registry.CHECKS)


@given(
    st.sampled_from(["felix_objects", "nodes", "services", "endpoint_slices", "ip_pools"]),
    st.lists(plain_values, max_size=3),
)
def test_no_object_of_the_api_breaks_a_check(name: str, values: list[Any]) -> None:
    objects = tuple(each for each in values if isinstance(each, dict))
    if name == "felix_objects":
        snapshot = replace(HEALTHY, felix_objects=objects)
    else:
        changes: dict[str, Any] = {name: objects}
        snapshot = replace(HEALTHY, kubernetes=replace(HEALTHY.kubernetes, **changes))
    assert len(registry.run(snapshot)) == len(registry.CHECKS)
