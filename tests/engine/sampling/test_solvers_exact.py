"""Solvers on Gaussian data, where the answer is known: orders of convergence and exact moments."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.engine.sampling.rows_case import (
    GaussianPoints,
    distance,
    log_snr_points,
    moments,
    run,
)
from torch import Tensor

from stepfuse.engine.sampling.methods.euler import euler
from stepfuse.engine.sampling.methods.euler_a import euler_a
from stepfuse.engine.sampling.methods.heun import heun
from stepfuse.engine.sampling.methods.plms import plms
from stepfuse.engine.sampling.methods.unipc import unipc
from stepfuse.engine.sampling.multistep import dpmpp
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms, table

Solver = Callable[[Points], list[Terms]]
STEPS = (20, 40, 80, 160, 320)
EXACT = 5  # rows that are told the right x, where the solver has its full order from there on
FREE = {"lower_order_final": False}


def rows_of(points: Points, solver: Solver) -> Tensor:
    return table(points, solver(points), "sample", None)


def error(steps: int, solver: Solver, exact: int = 0) -> float:
    """Of x at log-SNR 4 for x at -4, the first ``exact`` rows being told the right x.

    A multistep solver begins with steps of a lower order, whose error would hide its own.
    """
    points = log_snr_points(steps)
    data = GaussianPoints(points)
    start = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).view(3, 4)
    terms = solver(points)
    known = [data.flow(start, 0, row.start) for row in terms[:exact]]
    found = run(table(points, terms, "sample", None), data, start, known=known)
    return distance(found, data.flow(start, 0, steps))


def slope(errors: list[float]) -> float:
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        (euler, 0.95, 1.05),
        (lambda p: dpmpp(p, 1, **FREE), 0.95, 1.05),
        (lambda p: dpmpp(p, 2, "midpoint", **FREE), 1.9, 2.1),
        (lambda p: dpmpp(p, 2, "heun", **FREE), 1.9, 2.1),
        (heun, 1.9, 2.1),
        (lambda p: unipc(p, 2, "bh2", **FREE, disable_corrector=range(1000)), 1.9, 2.1),
    ],
    ids=["euler", "dpmpp 1", "2M midpoint", "2M heun", "heun", "unip 2"],
)
def test_orders(solver: Solver, low: float, high: float) -> None:
    errors = [error(steps, solver) for steps in STEPS]
    assert low < slope(errors) < high, errors


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        # what is told is not to be corrected
        (lambda p: unipc(p, 2, "bh1", **FREE, disable_corrector=range(EXACT - 1)), 2.8, 3.3),
        (lambda p: unipc(p, 2, "bh2", **FREE, disable_corrector=range(EXACT - 1)), 2.8, 3.3),
        (lambda p: unipc(p, 3, "bh1", **FREE, disable_corrector=range(EXACT - 1)), 3.5, 4.5),
        (lambda p: unipc(p, 3, "bh2", **FREE, disable_corrector=range(EXACT - 1)), 3.5, 4.5),
        (lambda p: dpmpp(p, 3, **FREE), 1.9, 2.2),
        (lambda p: dpmpp(p, 3, **FREE, strict=False), 3.0, 4.5),
        # its weights are those of equal steps in the noise, which no grid of log-SNR has
        (lambda p: plms(p, "sample"), 1.9, 2.1),
    ],
    ids=["unipc 2 bh1", "bh2", "unipc 3 bh1", "bh2", "3M strict", "3M", "plms"],
)
def test_high_orders_from_an_exact_start(solver: Solver, low: float, high: float) -> None:
    errors = [error(steps, solver, EXACT) for steps in STEPS]
    assert low < slope(errors) < high, errors


@pytest.mark.parametrize("steps", [10, 40])
def test_every_stochastic_solver_of_order_one_is_ancestral_sampling(steps: int) -> None:
    points = log_snr_points(steps)
    one = rows_of(points, lambda p: dpmpp(p, 1, stochastic=True))
    torch.testing.assert_close(rows_of(points, euler_a), one, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        (euler_a, 0.95, 1.05),
        (lambda p: dpmpp(p, 2, "midpoint", stochastic=True, **FREE), 1.9, 2.1),
        (lambda p: dpmpp(p, 2, "heun", stochastic=True, **FREE), 1.9, 2.1),
    ],
    ids=["euler a", "midpoint", "heun"],
)
def test_moments_of_stochastic_solvers(solver: Solver, low: float, high: float) -> None:
    """The mean has no error, since that of the data is constant; the spread has the order."""
    errors = []
    for steps in STEPS:
        points = log_snr_points(steps)
        data = GaussianPoints(points)
        mean, spread = moments(rows_of(points, solver), data)
        torch.testing.assert_close(mean, points.signal[-1] * data.MEANS, rtol=0, atol=1e-13)
        errors.append(float((spread - data.spread(steps)).abs().max()))
    assert low < slope(errors) < high, errors


def test_deterministic_solvers_have_the_moments_of_the_data() -> None:
    points = log_snr_points(160)
    data = GaussianPoints(points)
    for solver in (dpmpp, unipc, heun):
        mean, spread = moments(rows_of(points, solver), data)
        torch.testing.assert_close(mean, points.signal[-1] * data.MEANS, rtol=0, atol=1e-4)
        torch.testing.assert_close(spread, data.spread(160), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("strict", "low", "high"), [(True, 0.95, 1.15), (False, 1.9, 2.1)])
def test_order_three_of_the_sde(strict: bool, low: float, high: float) -> None:
    """As others write it a sign leaves an error of first order; without, the warm-up has one."""
    errors = []
    for steps in STEPS:
        points = log_snr_points(steps)
        data = GaussianPoints(points)
        rows = rows_of(points, lambda p: dpmpp(p, 3, stochastic=True, strict=strict, **FREE))
        errors.append(float((moments(rows, data)[1] - data.spread(steps)).abs().max()))
    assert low < slope(errors) < high, errors
