"""A recorded step: what it keeps of the run that it was taken from."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from stepfuse.engine.replay.capture import Recording


def test_results_of_the_run_that_is_recorded_die_in_it() -> None:
    """A later one may have the id of an earlier one, and is not taken for it."""
    x, out = torch.randn(64, 64), torch.empty(64, 64)
    alive: list[int] = []

    def step() -> None:
        y: Tensor = x * 2
        made = []
        for _ in range(20):
            made.append(ref(y))
            y = y + 1
        alive.append(sum(each() is not None for each in made))
        out.copy_(y)

    recording = Recording(step)
    assert alive == [0]
    for _ in range(2):
        x.normal_()
        out.fill_(torch.nan)
        recording.replay()
        assert torch.allclose(out, 2 * x + 20)
