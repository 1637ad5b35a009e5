"""A bound that is about to be taken: everything checked, the network at hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, empty
from tqdm.auto import tqdm

from stepfuse.engine.sampling.bound.chain import Chain
from stepfuse.engine.sampling.bound.gaussians import Cdf
from stepfuse.engine.sampling.bound.program import BoundProgram
from stepfuse.engine.sampling.bound.result import LEVELS, Bound
from stepfuse.engine.sampling.bound.walk import Walk
from stepfuse.engine.sampling.denoiser import Condition, Denoiser, Model, optimized
from stepfuse.engine.sampling.points import level_at
from stepfuse.engine.sampling.program_cache import GraphMode, check_graph
from stepfuse.engine.sampling.request import Request, check_images
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import check_timesteps
from stepfuse.engine.sampling.update import (
    PredictionType,
    Update,
    VarianceAtZero,
    VarianceType,
)
from stepfuse.kernels.arguments import check_kind, check_literal, check_values
from stepfuse.kernels.backends import resolve
from stepfuse.kernels.checks import as_integer

_OFF_GRID = 1e-3  # grey levels: float32 is off by 1e-5


class Bounding:
    """The bound of some images under a model, and what is predicted on the way.

    The arguments, and what is raised for them, are documented in `bits_per_dim`.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        x0: Tensor,
        *,
        condition: Condition | None = None,
        timesteps: Sequence[int] | None = None,
        prediction_type: PredictionType = "epsilon",
        variance_type: VarianceType = "fixed_large",
        variance_at_zero: VarianceAtZero = "next",
        clip_sample: float | None = 1.0,
        cdf: Cdf = "exact",
        seed: int | Tensor = 0,
        first_index: int | Tensor = 0,
        noise: Tensor | None = None,
        batch_size: int = 32,
        backend: str = "auto",
        graph: GraphMode | None = "auto",
        optimize: bool | torch.dtype = False,
        device: torch.device | str | None = None,
    ) -> None:
        check_kind("schedule", schedule, Schedule, "a Schedule, Schedule.linear() say")
        check_graph(graph)
        check_literal("cdf", cdf, Cdf)
        pairs = as_integer("batch_size", batch_size)
        if pairs < 1:
            raise ValueError(f"batch_size must be at least 1; got {pairs}")
        update = Update(
            "ddpm",
            prediction_type=prediction_type,
            variance_type=variance_type,
            variance_at_zero=variance_at_zero,
            clip_sample=clip_sample,
        )
        total = schedule.num_train_timesteps
        steps = range(total - 1, -1, -1) if timesteps is None else timesteps
        chain = Chain.of(schedule, [int(t) for t in check_timesteps(steps, total)], update)
        denoiser = Denoiser(optimized(model, optimize, 2))
        x0 = _eight_bits(x0).to(denoiser.place(device))
        request = Request(
            chain.timesteps,
            len(chain.timesteps),
            total - 1,
            partial(level_at, schedule, prediction_type=prediction_type),
            x0.device,
            x0.dtype,
            resolve(backend, x0.device, x0.dtype),
            None,
            x0.shape,
            seed,
            first_index,
            condition,
            noise=noise,
        )
        denoiser.check_labels(request.condition)
        self._denoiser, self._chain, self._request, self._x0 = denoiser, chain, request, x0
        self._abar, self._batch_size, self._cdf = schedule.alphas_cumprod, pairs, cdf
        self._graph = graph

    def bound(self, progress: bool = False) -> Bound:
        """All terms, under a progress bar where one is asked for."""
        chain, x0, walk = self._chain, self._x0, self._walk()
        bits, x0_mse = (empty(walk.count, dtype=torch.float64, device=x0.device) for _ in range(2))
        with tqdm(total=walk.count, unit=" terms", unit_scale=True, disable=not progress) as bar:

            def take(cut: slice, program: BoundProgram) -> None:
                count = cut.stop - cut.start
                bits[cut].copy_(program.bits[:count])
                x0_mse[cut].copy_(program.x0_mse[:count])
                bar.update(count)

            walk.run(take)
        shape = (len(chain.timesteps), len(x0))
        squares = x0_mse.view(shape).T.cpu().contiguous()
        return Bound(
            chain.timesteps,
            chain.prior(x0).cpu(),
            bits.view(shape).T.cpu().contiguous(),
            squares,
            squares * chain.snr,
        )

    def predictions(self, steps: Sequence[int]) -> Tensor:
        """x0_hat(x_t) at ``timesteps[i]`` for each i of ``steps``: [len(steps), N, C, ...].

        x_t is that of the bound. An i of S is after the last step: the images themselves.
        """
        last, x0 = len(self._chain.timesteps), self._x0
        shown = x0.expand(len(steps), *x0.shape).clone()
        unfinished = [k for k, i in enumerate(steps) if i < last]
        if unfinished:
            walk = self._walk([steps[k] for k in unfinished])
            found = empty((walk.count, *x0.shape[1:]), dtype=x0.dtype, device=x0.device)

            def take(cut: slice, program: BoundProgram) -> None:
                found[cut].copy_(program.x0_hat[: cut.stop - cut.start])

            walk.run(take)
            shown[unfinished] = found.view(len(unfinished), *x0.shape)
        return shown

    def _walk(self, rows: Sequence[int] | None = None) -> Walk:
        return Walk(
            self._denoiser,
            self._chain,
            self._abar,
            self._request,
            self._x0,
            self._batch_size,
            self._cdf,
            self._request.backend,
            self._graph,
            rows,
        )


def _eight_bits(x0: Tensor) -> Tensor:
    """Images in [-1, 1] of uint8 ones, or of floats that are on their grid."""
    check_values("x0", x0)
    of_bytes = x0.dtype == torch.uint8
    if of_bytes:
        x0 = x0.to(torch.float32).div_(LEVELS).sub_(1)
    elif x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x0 must be one of uint8, float32, float64; got {x0.dtype}")
    check_images("x0", x0)
    x0 = x0.detach()
    if of_bytes:
        return x0
    levels = (x0.double() + 1) * LEVELS
    off = ~((levels - levels.round()).abs() <= _OFF_GRID)  # so written, NaN is off
    off |= (levels < -_OFF_GRID) | (levels > 2 * LEVELS + _OFF_GRID)
    if bool(off.any()):
        raise ValueError(
            "x0 must hold 8-bit images, u / 127.5 - 1 for whole u in 0 .. 255: the decoder gives "
            f"probabilities of such levels alone; got {float(x0[off][0]):.6g}, which is "
            f"u = {float(levels[off][0]):.6g}"
        )
    return x0
