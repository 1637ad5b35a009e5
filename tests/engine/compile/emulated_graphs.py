"""Graphs for the CPU, which behave as those of CUDA do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.compile.captured import Run
from stepfuse.engine.replay.capture import Recording


class EmulatedGraphs:
    """Recordings, in the place of CUDA graphs: frozen operations on memory that stays."""

    def __init__(self) -> None:
        self.made: list[EmulatedGraph] = []
        self.capturing = False
        self.refuses = ""
        self.turns = 0
        self._busy = False

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def busy(self) -> bool:
        return self.capturing

    def capture(self, run: Run, device: torch.device) -> EmulatedGraph:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.made.append(EmulatedGraph(run))
        return self.made[-1]

    def order(self, device: torch.device) -> EmulatedGraphs:
        return self

    def wait(self, *tensors: Tensor) -> None:
        assert not self._busy, "another launch of the same graph is under way"
        self._busy = True

    def done(self) -> None:
        self._busy = False
        self.turns += 1


class EmulatedGraph:
    """Its results lie where the first run left them, and every replay writes there."""

    def __init__(self, run: Run) -> None:
        self.results: Sequence[Any] = [v.clone() if isinstance(v, Tensor) else v for v in run()]
        self.replays = 0

        def step() -> None:
            for old, new in zip(self.results, run(), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        self._replay = Recording(step).replay

    def replay(self) -> None:
        self.replays += 1
        self._replay()
