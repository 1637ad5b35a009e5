"""All pairs of samples and timesteps, in batches of one size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from stepfuse.engine.compile.optimize import Optimized
from stepfuse.engine.replay.device_order import DeviceOrder
from stepfuse.engine.sampling.bound.chain import Chain
from stepfuse.engine.sampling.bound.gaussians import Cdf
from stepfuse.engine.sampling.bound.program import BoundProgram, Pairs
from stepfuse.engine.sampling.condition import pick_condition
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.program_cache import GraphMode, Runner
from stepfuse.engine.sampling.request import Request

_LEAST_BATCHES = 64  # a capture takes three steps, and saves a few percent of each


class Walk:
    """Runs over pairs (row of the chain, sample), row by row, in batches of ``batch_size``.

    The last batch is filled up with its last pair, so that one shape and one captured step serve
    all of them. "auto" captures where there are batches enough to make up for the steps that a
    capture takes.

    Args:
        request: seeds, numbers, conditions and noise of the samples, checked.
        x0: [N, C, ...], of the dtype to compute in.
        rows: of the chain, by default all.
        The rest is documented in `bits_per_dim`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        chain: Chain,
        abar: Tensor,
        request: Request,
        x0: Tensor,
        batch_size: int,
        cdf: Cdf,
        backend: str,
        graph: GraphMode | None,
        rows: Sequence[int] | None = None,
    ) -> None:
        self._denoiser, self._chain, self._abar = denoiser, chain, abar
        self._request, self._x0, self._cdf, self._backend = request, x0, cdf, backend
        self._rows = torch.tensor(
            list(range(len(chain.timesteps)) if rows is None else rows), device=x0.device
        )
        self.count = len(self._rows) * len(x0)
        self._batch_size = min(batch_size, self.count)
        few = self.count < _LEAST_BATCHES * self._batch_size
        self._graph = None if graph == "auto" and few else graph
        self.stats: Counter[str] = Counter()

    @torch.no_grad()
    def run(self, take: Callable[[slice, BoundProgram], Any]) -> None:
        """Hand every finished batch over: pair p = row p // N for sample p % N of a slice."""
        if isinstance(self._denoiser.model, Optimized):
            timesteps = torch.tensor(self._chain.timesteps)[self._rows.cpu()]
            self._denoiser.model.prepare(timesteps.tolist())
        order = DeviceOrder(self._x0.device)
        runner: Runner[BoundProgram] | None = None
        for cut, pairs in self._batches():
            if runner is None:
                program = BoundProgram(
                    self._denoiser, self._chain, self._abar, pairs, self._cdf, self._backend
                )
                runner = Runner(program, self._graph, self.stats, WeakSet(), order)
            runner.program.load(pairs)
            runner.check()
            runner.run_step(False)
            take(cut, runner.program)
        if runner is not None:
            order.finish()  # before its buffers are let go

    def _batches(self) -> Iterator[tuple[slice, Pairs]]:
        """Where a batch stands among the pairs, and its content."""
        samples = len(self._x0)
        for start in range(0, self.count, self._batch_size):
            stop = min(start + self._batch_size, self.count)
            numbers = torch.arange(start, start + self._batch_size, device=self._x0.device)
            numbers.clamp_(max=self.count - 1)
            yield slice(start, stop), self._pairs(numbers % samples, self._rows[numbers // samples])

    def _pairs(self, which: Tensor, rows: Tensor) -> Pairs:
        request = self._request
        return Pairs(
            rows,
            self._x0[which],
            request.seeds[which],
            request.samples[which],
            pick_condition(request.condition, which),
            None if request.noise is None else request.noise[rows, which],
        )
