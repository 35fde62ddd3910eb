"""How maps are made of an image."""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack

import pytest

from calitrace.kernel import images, syscall

ARRAY, PERCPU_ARRAY, ARRAY_OF_MAPS = 2, 6, 12


@pytest.mark.parametrize(("like", "inner"), [({}, 1), ({"template": 77}, 77), ({"other": 77}, 1)])
def test_what_the_maps_in_a_map_of_maps_are_like(
    monkeypatch: pytest.MonkeyPatch, like: dict[str, int], inner: int
) -> None:
    made: list[tuple[str, int]] = []

    def map_create(*_: int, name: str, flags: int, inner: int) -> int:
        made.append((name, inner))
        return len(made)

    monkeypatch.setattr(syscall, "map_create", map_create)
    monkeypatch.setattr(os, "close", lambda _: None)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    maps = {
        "states": images.Map(ARRAY_OF_MAPS, 4, 4, 256, 0, "template"),
        "template": images.Map(PERCPU_ARRAY, 4, 512, 2, 0),
    }
    with ExitStack() as stack:
        assert images.make_maps(images.Image(maps, {}), stack, like) == {"template": 1, "states": 2}
    assert made == [("template", 0), ("states", inner)]
