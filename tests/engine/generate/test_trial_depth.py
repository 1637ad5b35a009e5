"""How far a trial goes: the batch sizes that it tries, and the one that it takes."""

from __future__ import annotations

from typing import Any

import pytest

from stepfuse.engine.generate import trial
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.trial import LOOK, THOROUGH, Depth, Found, Tried, measure

# images/s, and how long it took to find out
RATES = {1: 2.0, 2: 2.6, 4: 3.1, 8: 3.4, 16: 3.45, 32: 3.4}


class Pretended:
    """A trial whose figures are known."""

    seconds = 0.1

    def __init__(self, settings: Settings, device: Any) -> None:
        pass

    def loop(self, size: int) -> tuple[Tried, float]:
        return Tried(size, RATES[size], size), self.seconds

    def settle(self, tried: Tried) -> Found:
        return Found(tried.batch_size, tried.images_per_s, tried.peak_bytes, 1.0, "")


def sizes(depth: Depth, memory: int | None = None, settings: Settings | None = None) -> list[int]:
    """The batch sizes that are tried, and the one that is taken."""
    tried: list[Tried] = []
    found = measure(settings or Settings(), 1000, "cpu", memory, depth, tried.append)
    return [*(each.batch_size for each in tried), found.batch_size]


def test_a_look_ends_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 gain a tenth over 4, 16 gain a hundredth over 8."""
    monkeypatch.setattr(trial, "_Trial", Pretended)
    assert sizes(THOROUGH) == [1, 2, 4, 8, 16, 8]
    assert sizes(LOOK) == [1, 2, 4, 8, 8]
    assert sizes(LOOK, settings=Settings(batch_size=16)) == [16, 16]
    assert sizes(THOROUGH, memory=2) == [1, 2, 4, 2]


def test_a_look_does_not_grow_beyond_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2, 4 ... bytes as images: after 4, of which 2 more than before, 8 are expected."""
    monkeypatch.setattr(trial, "_Trial", Pretended)
    assert sizes(Depth(1.0, 20.0, 7)) == [1, 2, 4, 4]
    assert sizes(Depth(1.0, 20.0, 8)) == [1, 2, 4, 8, 8]
    assert sizes(Depth(1.1, 20.0, 0.5)) == [1, 2, 4, 8, 8]  # larger than that at once


def test_what_takes_long_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_Trial", Pretended)
    monkeypatch.setattr(Pretended, "seconds", 2.0)
    assert sizes(THOROUGH) == [1, 2, 4, 8, 16, 8]
    assert sizes(LOOK) == [1, 1]
