"""Where the time of a step goes: the network, the sampler's update, and the rest.

A captured step runs no Python that could hold a clock. So the clock is an operator: it is recorded
with the others, and reads the time whenever the step is replayed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.bench.loops import DiffusersLoop, Loop, SamplerLoop
from stepfuse.bench.record import Split
from stepfuse.bench.workload import Workload
from stepfuse.engine.compile.optimize import Optimized
from stepfuse.engine.sampling import program

RUNS = 3
NETWORK, UPDATE = 0, 1

_LIBRARY = torch.library.Library("stepfuse_bench", "FRAGMENT")
_LIBRARY.define("clock(Tensor x, int what) -> ()")
_reads: list[tuple[int, float]] = []


def _clock(x: Tensor, what: int) -> None:
    _reads.append((what, time.perf_counter()))


_LIBRARY.impl("clock", _clock, "CPU")


class Clocked(nn.Module):
    """A model with the clock read before and after it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Any:
        torch.ops.stepfuse_bench.clock(x, NETWORK)
        output = self.model(x, t, **condition)
        torch.ops.stepfuse_bench.clock(x, NETWORK)
        return output


@contextlib.contextmanager
def clocked_update() -> Iterator[None]:
    """Programs that are captured, or run, inside read the clock around their update."""
    update = program.denoise_step

    def clocked(x: Tensor, *arguments: Any, **named: Any) -> Any:
        torch.ops.stepfuse_bench.clock(x, UPDATE)
        result = update(x, *arguments, **named)
        torch.ops.stepfuse_bench.clock(x, UPDATE)
        return result

    program.denoise_step = clocked
    try:
        yield
    finally:
        program.denoise_step = update


def split(loop: Loop, workload: Workload, batch: int) -> Split:
    """Times of a step of ``loop``; its images are made a few times more."""
    if isinstance(loop, SamplerLoop):
        return _of_sampler(loop, workload, batch)
    assert isinstance(loop, DiffusersLoop)
    return _of_diffusers(loop, workload, batch)


def _of_sampler(loop: SamplerLoop, workload: Workload, batch: int) -> Split:
    model = loop.sampler.denoiser.model
    if isinstance(model, Optimized):
        model.prepare(loop.sampler.timesteps)
    steps = len(loop.sampler.timesteps)
    sampler = workload.sampler(Clocked(model), steps=steps, graph=loop.sampler.graph)
    clocked = SamplerLoop(workload, batch, sampler, loop.condition)
    result = Split(batch, [], [], [], "")
    with clocked_update():
        _runs(clocked, steps, result)
    captured = "captured" if sampler.stats()["replays"] else "step by step"
    result.how = f"our loop, {captured}, with a clock among its operators"
    return result


def _of_diffusers(loop: DiffusersLoop, workload: Workload, batch: int) -> Split:
    call, update = loop.call, loop.scheduler.step
    result = Split(batch, [], [], [], "the loop with a clock around network and scheduler.step")

    def clocked_step(*arguments: Any, **named: Any) -> Any:
        _clock(arguments[0], UPDATE)
        stepped = update(*arguments, **named)
        _clock(arguments[0], UPDATE)
        return stepped

    loop.call, loop.scheduler.step = Clocked(call), clocked_step
    try:
        _runs(loop, len(loop.timesteps), result)
    finally:
        loop.call = call
        del loop.scheduler.step  # the class's own again
    return result


def _runs(loop: Loop, steps: int, into: Split) -> None:
    loop.images()  # captures
    for _ in range(RUNS):
        _reads.clear()
        start = time.perf_counter()
        loop.images()
        whole = time.perf_counter() - start
        network, update = (_between(what) for what in (NETWORK, UPDATE))
        into.network.append(network / steps)
        into.update.append(update / steps)
        into.rest.append(max(whole - network - update, 0.0) / steps)
    _reads.clear()


def _between(what: int) -> float:
    """Seconds from each first reading of a kind to its second."""
    times = [seconds for kind, seconds in _reads if kind == what]
    return sum(times[1::2]) - sum(times[::2])
