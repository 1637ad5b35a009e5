"""Gaussian data and its optimal denoiser: what every sampler must give, known exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.engine.sampling.analytic import Gaussian
from torch import Tensor

from stepfuse import Sampler, Schedule, spaced_timesteps
from stepfuse.engine.sampling.plan import inversion_table, step_table
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.step_row import Column

LINEAR = Schedule.linear()
FIFTY = spaced_timesteps(1000, 50)
PREDICTIONS = ["epsilon", "sample", "v_prediction", "mean"]

# standard deviation of x0 after 50 uniform steps, for data N(0.3, 0.5^2); six figures are given
FIGURES = {
    "eta 0": ({"eta": 0.0}, 0.472439),
    "eta 0.5": ({"eta": 0.5}, 0.466651),
    "eta 1": ({"eta": 1.0}, 0.444123),
    "sigma-hat": ({"method": "ddim_hat"}, 0.517229),
}
SIX_FIGURES = 1e-6


def slope_and_offset(model: Gaussian, t: int) -> tuple[float, float]:
    """(k, m) of model(x, t) = k x + m."""
    ends = model(torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([t, t]))
    return float(ends[1] - ends[0]), float(ends[0])


def propagate(table: Tensor, model: Gaussian, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation after every row, from those at its beginning."""
    for row in table:
        k, m = slope_and_offset(model, int(row[Column.TIMESTEP]))
        by_output = row[Column.C_O] + row[Column.C_0] * row[Column.P_O]
        by_x = row[Column.C_X] + row[Column.C_0] * row[Column.P_X]
        mean = float((by_x + by_output * k) * mean + by_output * m)
        std = math.hypot(float((by_x + by_output * k) * std), float(row[Column.SIGMA]))
    return mean, std


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", FIGURES)
def test_standard_deviation_through_the_rows(name: str, prediction: str) -> None:
    settings, expected = FIGURES[name]
    update = Update(**settings, prediction_type=prediction, clip_sample=None)
    table = step_table(LINEAR, FIFTY, update)
    mean, std = propagate(table, Gaussian(LINEAR, prediction), 0.0, 1.0)
    assert std == pytest.approx(expected, abs=SIX_FIGURES)
    assert mean == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("name", FIGURES)
def test_standard_deviation_of_samples(name: str) -> None:
    settings, expected = FIGURES[name]
    sampler = Sampler(Gaussian(LINEAR), LINEAR, **settings, clip_sample=None)
    values = sampler.sample((16, 1, 32, 32), seed=1)
    # of 16,384 values: the standard error is std / sqrt(2 n) = 0.0028; four of them
    assert float(values.std()) == pytest.approx(expected, abs=0.011)
    mean, _ = propagate(sampler.plan.table, Gaussian(LINEAR), 0.0, 1.0)
    assert float(values.mean()) == pytest.approx(mean, abs=4 * expected / 128)
    # noise is fresh in every element: neighbours do not know of each other
    assert torch.corrcoef(values.view(2, -1))[0, 1].abs() < 4 / 128 * math.sqrt(2)


def test_ancestral_sampling_over_all_timesteps_finds_the_data() -> None:
    every = list(range(999, -1, -1))
    for variance in ("fixed_small", "fixed_large"):
        update = Update(method="ddpm", variance_type=variance, clip_sample=None)
        mean, std = propagate(step_table(LINEAR, every, update), Gaussian(LINEAR), 0.0, 1.0)
        assert mean == pytest.approx(0.3, abs=2e-3)
        assert std == pytest.approx(0.5, abs=5e-3)


@pytest.mark.parametrize("name", FIGURES)
def test_more_steps_come_closer(name: str) -> None:
    settings, _ = FIGURES[name]
    errors = []
    for steps in (25, 50, 100, 200):
        table = step_table(
            LINEAR, spaced_timesteps(1000, steps), Update(**settings, clip_sample=None)
        )
        errors.append(abs(propagate(table, Gaussian(LINEAR), 0.0, 1.0)[1] - 0.5))
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(1.5 < ratio < 3 for ratio in ratios), errors  # a first-order method halves it


@pytest.mark.parametrize("convention", ["current", "target"])
def test_encoding_finds_the_normal_distribution(convention: str) -> None:
    errors = []
    for steps in (50, 100, 200, 400):
        timesteps = spaced_timesteps(1000, steps, "trailing")
        update = Update(clip_sample=None)
        table = inversion_table(LINEAR, timesteps, update, convention)
        mean, std = propagate(table, Gaussian(LINEAR), 0.3, 0.5)
        errors.append(abs(std - 1))
        assert mean == pytest.approx(0, abs=0.05)
    # halves every time until the distance to abar_T = 0 is all that is left
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["ddim", "ddpm", "ddim_hat"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_prediction_types_agree(method: str, dtype: torch.dtype, clip: float | None) -> None:
    """One denoiser in four languages walks one trajectory."""
    results = []
    for prediction in PREDICTIONS:
        sampler = Sampler(
            Gaussian(LINEAR, prediction),
            LINEAR,
            method=method,
            steps=20,
            prediction_type=prediction,
            clip_sample=clip,
            dtype=dtype,
            graph=None,
        )
        steps = list(sampler.iterate((2, 3, 4, 4), seed=5))
        results.append(torch.stack([step.x for step in steps] + [step.x0 for step in steps]))
    for other in results[1:3]:
        # float32: eps is divided by sqrt(abar) = 0.01 at the start, 6e-8 / 0.01 of x0 is lost
        near = 1e-11 if dtype == torch.float64 else 3e-5
        torch.testing.assert_close(other, results[0], rtol=0, atol=near)
    # a mean holds x0 with weight sqrt(abar) beta / (1 - abar): 1e-4 at the start
    near = 1e-9 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(results[3], results[0], rtol=0, atol=near)


@pytest.mark.parametrize("convention", ["current", "target"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_round_trips_converge(prediction: str, convention: str) -> None:
    if convention == "target" and prediction in ("sample", "mean"):
        sampler = Sampler(Gaussian(LINEAR), LINEAR, steps=10, prediction_type=prediction)
        with pytest.raises(ValueError, match="use 'current'"):
            sampler.encode(torch.zeros(1, 1, 2), convention=convention)
        return
    image = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)
    errors = []
    for steps in (20, 40, 80, 160):
        sampler = Sampler(
            Gaussian(LINEAR, prediction),
            LINEAR,
            steps=steps,
            prediction_type=prediction,
            dtype=torch.float64,
        )
        back = sampler.decode(sampler.encode(image, convention=convention))
        errors.append(float((back - image).abs().max()))
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 0.05
    assert all(1.6 < ratio < 3 for ratio in ratios), (errors, ratios)
