"""Grids of noise levels: timesteps that need not be whole.

With sigma = sqrt(1 / abar - 1), between the first and the last of a schedule, and u = 0 .. 1 in S
equal parts:

    karras        (sigma_max^(1/7) + u (sigma_min^(1/7) - sigma_max^(1/7)))^7   Karras et al., eq. 5
    exponential   equal parts of log sigma
    logsnr        the same under another name: log-SNR is -log sigma (Lu et al. 2022, section 3.3)
    beta          sigma_min + (sigma_max - sigma_min) q(1 - u), q the quantiles of Beta(0.6, 0.6)
                                                                 Lee et al. 2024, "Beta sampling"

or sigmas of one's own. A sigma becomes the timestep at which the schedule has it, log sigma being
interpolated between whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stepfuse.engine.sampling.points import log_sigmas
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import Spacing, check_timesteps, spaced_timesteps
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.arguments import as_list
from stepfuse.kernels.checks import as_integer, as_number, received

GridName = Literal["karras", "exponential", "logsnr", "beta"]
Grid = GridName | Sequence[float] | Tensor
Vector = npt.NDArray[np.float64]
RHO = 7.0
SHAPE = 0.6  # of both ends of the beta distribution


def choose(
    schedule: Schedule,
    update: Update,
    steps: int | str,
    spacing: Spacing,
    steps_offset: int,
    timesteps: Sequence[float] | None,
    grid: Grid | None,
) -> list[float]:
    """Where the steps of a sampler start, descending: ints where they are whole.

    A model of flow matching is at sigma = t / T, from 1 at the first timestep T: spacings are those
    of 0 .. T-1, one further up.

    Raises ValueError for both timesteps and grid, and for a grid, or timesteps that are not whole,
    with a method that takes none.
    """
    total, method = schedule.num_train_timesteps, f"method {str(update.method)!r}"
    flow = update.prediction_type == "flow_prediction"
    if grid is None:
        if timesteps is not None:
            whole = "grid" not in update.solver.takes
            return check_timesteps(timesteps, total, whole, int(flow))
        spaced = spaced_timesteps(total, steps, spacing, steps_offset)
        return [t + flow for t in spaced]
    if "grid" not in update.solver.takes:
        raise ValueError(f"{method} takes no grid: it must be None; got {received(grid)}")
    if timesteps is not None:
        raise ValueError("give timesteps or grid, not both")
    if flow:
        if isinstance(grid, str):
            raise ValueError(
                "grid must be a list of sigmas for 'flow_prediction', whose sigmas are in (0, 1]; "
                f"got {grid!r}"
            )
        return [total * sigma for sigma in _falling(grid, 1 / total, 1.0)]
    return grid_timesteps(schedule, grid, steps)


def grid_timesteps(schedule: Schedule, grid: Grid, steps: int | str) -> list[float]:
    """The timesteps of a grid, descending, within 0 .. T-1.

    A list of sigmas has its own length; a 0 at its end is x_0, where every sampler ends.

    Raises ValueError for an unknown grid, one of a single step, a schedule whose noise is not
    finite, and sigmas that do not fall or that the schedule has not.
    """
    if isinstance(grid, str):
        sigmas = named_sigmas(schedule, grid, as_integer("steps", steps, "an int for a grid"))
    else:
        sigmas = _falling(grid, *_range(schedule))
    return timesteps_of(schedule, sigmas)


def named_sigmas(schedule: Schedule, grid: str, steps: int) -> list[float]:
    """S sigmas from that of T-1 down to that of 0."""
    if grid not in get_args(GridName):
        raise ValueError(
            f"grid must be one of {', '.join(get_args(GridName))}, or a list of sigmas; got "
            f"{received(grid)}"
        )
    if steps < 2:
        raise ValueError(f"grid {grid!r} has two ends: steps must be at least 2; got {steps}")
    low, high = _range(schedule)
    ramp = np.linspace(0, 1, steps)
    if grid == "karras":
        near, far = low ** (1 / RHO), high ** (1 / RHO)
        sigmas = (far + ramp * (near - far)) ** RHO
    elif grid == "beta":
        sigmas = low + (high - low) * beta_quantiles(1 - ramp)
    else:
        sigmas = np.exp(np.linspace(math.log(high), math.log(low), steps))
    found: list[float] = sigmas.tolist()
    found[0], found[-1] = high, low  # not as rounding has them
    return found


def timesteps_of(schedule: Schedule, sigmas: Sequence[float]) -> list[float]:
    """Where the schedule has these sigmas, in 0 .. T-1."""
    logs = log_sigmas(schedule).numpy()
    if not bool((np.diff(logs) > 0).all()):
        raise ValueError("a grid needs a schedule whose noise grows at every timestep")
    found = np.interp(np.log(sigmas), logs, np.arange(len(logs))).tolist()
    return [int(t) if t == int(t) else t for t in found]


def _range(schedule: Schedule) -> tuple[float, float]:
    logs = log_sigmas(schedule)
    low, high = float(logs[0].exp()), float(logs[-1].exp())
    if not (low > 0 and math.isfinite(high)):
        raise ValueError(
            "a grid needs noise that is finite at every timestep, and schedules without zero "
            f"terminal SNR have it; got sigma from {low:g} to {high:g}"
        )
    return low, high


def _falling(grid: Sequence[float] | Tensor, low: float, high: float) -> list[float]:
    """A caller's own sigmas, without the 0 of x_0."""
    values = as_list("grid", grid, "a name or a list of sigmas")
    sigmas = [as_number("grid", v.item() if isinstance(v, Tensor) else v) for v in values]
    if sigmas and sigmas[-1] == 0:
        sigmas.pop()
    if not sigmas or any(a <= b for a, b in pairwise(sigmas)):
        raise ValueError(f"the sigmas of grid must fall, and be one at least; got {sigmas}")
    near = 1e-6  # of rounding to float32
    if sigmas[0] > high * (1 + near) or sigmas[-1] < low * (1 - near):
        raise ValueError(
            f"the sigmas of grid must be in {low:g} .. {high:g}, those of the schedule; got "
            f"{sigmas[0]:g} .. {sigmas[-1]:g}"
        )
    return [min(sigma, high) for sigma in sigmas]


def beta_quantiles(probabilities: Vector) -> Vector:
    """The quantiles of Beta(0.6, 0.6), [S], by bisection.

    The lower half of the distribution function is x^a sum_n (1-a)_n x^n / (n! (a+n)), the upper
    half its mirror image.
    """
    mirrored = probabilities > 0.5
    wanted = np.where(mirrored, 1 - probabilities, probabilities)
    n = np.arange(1, 60)  # 0.5^60 is 1e-18
    factors = np.cumprod(np.concatenate([[1.0], (n - SHAPE) / n])) / (SHAPE + np.arange(60))
    whole = math.gamma(SHAPE) ** 2 / math.gamma(2 * SHAPE)

    def distribution(x: Vector) -> Vector:
        value: Vector = x**SHAPE * np.polynomial.polynomial.polyval(x, factors) / whole
        return value

    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(100):
        middle = (low + high) / 2
        below = distribution(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(mirrored, 1 - high, np.where(wanted == 0, 0.0, high))
