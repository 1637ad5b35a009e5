"""Graphs for the CPU, which behave as those of CUDA do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.compile.captured import Run
from stepfuse.engine.sampling.capture import Recording


class EmulatedGraphs:
    """Recordings, in the place of CUDA graphs: frozen operations on memory that stays."""

    def __init__(self) -> None:
        self.made: list[EmulatedGraph] = []
        self.capturing = False
        self.refuses = ""
        self.turns = 0

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

    @contextmanager
    def turn(self, buffers: Sequence[Tensor]) -> Iterator[None]:
        self.turns += 1
        yield


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
