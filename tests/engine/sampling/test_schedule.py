"""The schedules: published figures, two libraries' tables, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from stepfuse import Schedule

# the peers compute in float32: 1000 products of numbers near 1, each rounded to 6e-8
FLOAT32_PRODUCT = 1e-4
ROUNDING = 1e-14  # float64, a few hundred roundings

ALL = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "cosine": Schedule.cosine,
    "sigmoid_beta": Schedule.sigmoid_beta,
    "sigmoid_alpha": Schedule.sigmoid_alpha,
    "keras": Schedule.keras,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [1, 100, 1000])
def test_every_schedule_is_float64_and_destroys_the_signal_monotonically(
    name: str, steps: int
) -> None:
    schedule = ALL[name](steps)
    assert schedule.num_train_timesteps == steps == len(schedule.betas)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.alphas_cumprod.shape == (steps,)
    assert bool((schedule.betas > 0).all())
    assert bool((schedule.betas < 1).all())
    assert bool((schedule.alphas_cumprod.diff() < 0).all())
    torch.testing.assert_close(
        schedule.alphas_cumprod, torch.cumprod(1 - schedule.betas, 0), rtol=0, atol=0
    )
    assert f"num_train_timesteps={steps}" in repr(schedule)


def test_linear_figures() -> None:
    schedule = Schedule.linear()
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(4.035829765375676e-05, rel=1e-13)
    abar = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    small = schedule.betas * (1 - before) / (1 - abar)
    assert small[:3].tolist() == pytest.approx([0, 5.45318766e-5, 8.54891152e-5], rel=1e-8)


def test_cosine_figures() -> None:
    last_two = Schedule.cosine().alphas_cumprod[-2:].tolist()
    assert last_two == pytest.approx([2.42876691e-06, 2.42876691e-09], rel=1e-8)
    assert float(Schedule.cosine().betas[-1]) == 0.999


def test_stable_diffusion_figures() -> None:
    abar = Schedule.scaled_linear(1000, 0.00085, 0.012).alphas_cumprod
    assert float(abar[0]) == pytest.approx(0.99915, rel=1e-12)
    assert float(abar[-1]) == pytest.approx(0.0046601, rel=2e-5)


def test_keras_angles() -> None:
    abar = Schedule.keras(1000).alphas_cumprod
    middle = float(abar[499])  # u = 500 / 1000
    assert math.sqrt(1 - middle) == pytest.approx(0.804111, abs=1e-6)
    assert math.sqrt(middle) == pytest.approx(0.594480, abs=1e-6)
    assert float(abar[-1].sqrt()) == pytest.approx(0.02, rel=1e-9)


def test_linear_is_rescaled_for_other_lengths_unless_told_not_to() -> None:
    assert Schedule.linear(250).betas[[0, -1]].tolist() == pytest.approx([4e-4, 0.08], rel=1e-14)
    plain = Schedule.linear(250, rescale=False)
    assert plain.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-14)


def test_one_step() -> None:
    assert Schedule.linear(20).alphas_cumprod[-1] == 0  # the last beta is 0.02 * 50
    schedule = Schedule.linear(1, rescale=False)
    assert schedule.betas.tolist() == [1e-4]
    assert schedule.alphas_cumprod.tolist() == [1 - 1e-4]
    assert Schedule.cosine(1).betas.tolist() == [0.999]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Schedule.linear(), {"beta_schedule": "linear"}),
        (
            Schedule.scaled_linear(1000, 0.00085, 0.012),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (Schedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (Schedule.sigmoid_beta(), {"beta_schedule": "sigmoid"}),
        (Schedule.linear(200, rescale=False), {"num_train_timesteps": 200}),
    ],
    ids=["linear", "scaled_linear", "cosine", "sigmoid", "linear200"],
)
def test_equals_diffusers(ours: Schedule, theirs: dict[str, object]) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**{"beta_start": 1e-4, "beta_end": 0.02, **theirs})
    torch.testing.assert_close(ours.betas, scheduler.betas.double(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(
        ours.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=FLOAT32_PRODUCT, atol=0
    )


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr_equals_diffusers(name: str) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=name, rescale_betas_zero_snr=True
    )
    ours = ALL[name](1000, 0.00085, 0.012).zero_terminal_snr()
    assert float(ours.alphas_cumprod[-1]) == 0
    assert float(ours.betas[-1]) == 1
    # squares of differences of roots: 1e-7 of the largest, not of each
    torch.testing.assert_close(
        ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", sorted(ALL))
def test_zero_terminal_snr_keeps_the_first_and_shifts_the_roots(name: str) -> None:
    schedule = ALL[name](1000)
    rescaled = schedule.zero_terminal_snr()
    root, new = schedule.alphas_cumprod.sqrt(), rescaled.alphas_cumprod.sqrt()
    assert float(rescaled.alphas_cumprod[-1]) == 0
    assert float(rescaled.alphas_cumprod[0]) == pytest.approx(
        float(schedule.alphas_cumprod[0]), rel=ROUNDING
    )
    expected = (root - root[-1]) / (root[0] - root[-1]) * root[0]
    torch.testing.assert_close(new, expected, rtol=1e-11, atol=1e-15)
    assert "zero terminal SNR" in repr(rescaled)


@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Schedule.linear, "linear_beta_schedule"),
        (Schedule.cosine, "cosine_beta_schedule"),
        (Schedule.sigmoid_alpha, "sigmoid_beta_schedule"),
    ],
    ids=["linear", "cosine", "sigmoid"],
)
def test_equals_lucidrains(ours: object, theirs: str, steps: int) -> None:
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as peer

    betas = getattr(peer, theirs)(steps)
    assert betas.dtype == torch.float64
    # theirs takes the sigmoids of the two ends in float32
    tolerance = 1e-5 if "sigmoid" in theirs else 1e-12
    torch.testing.assert_close(ours(steps).betas, betas, rtol=tolerance, atol=tolerance)  # type: ignore[operator]


def test_from_alphas_cumprod_is_the_inverse() -> None:
    abar = Schedule.cosine(100).alphas_cumprod
    again = Schedule.from_alphas_cumprod(abar).alphas_cumprod
    torch.testing.assert_close(again, abar, rtol=1e-13, atol=0)


def test_from_betas_takes_lists_and_keeps_no_reference() -> None:
    betas = torch.tensor([0.1, 0.2])
    schedule = Schedule.from_betas(betas)
    betas.zero_()
    assert schedule.betas.tolist() == pytest.approx([0.1, 0.2])
    assert schedule.betas.dtype == torch.float64
    assert Schedule.from_betas([0.5, 1.0]).alphas_cumprod.tolist() == [0.5, 0.0]


def test_frozen_comparable_and_hashable() -> None:
    schedule = Schedule.linear(10, rescale=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.betas = torch.ones(3)  # type: ignore[misc]
    twin = Schedule.from_betas(schedule.betas)
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    assert schedule != Schedule.cosine(10)
    assert schedule != "linear"
    assert len({schedule, twin, Schedule.cosine(10)}) == 2


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "at least one"),
        ([[0.1, 0.2]], r"vector.*\(1, 2\)"),
        ([0.1, math.nan], "finite"),
        ([0.1, math.inf], "finite"),
        ([0.1, -0.1], r"\[0, 1\).*-0.1"),
        ([0.1, 1.5], r"\[0, 1\).*1.5"),
        ([1.0, 0.5], r"the last may be 1"),
    ],
)
def test_betas_that_are_refused(betas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_betas(betas)


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (0, ValueError, "1 .. .* got 0"),
        (-5, ValueError, "got -5"),
        (2**24, ValueError, "got 16777216"),
        (10.0, TypeError, "int; got float"),
        (True, TypeError, "int; got bool"),
    ],
)
def test_lengths_that_are_refused(
    name: str, steps: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ALL[name](steps)


def test_a_linear_schedule_too_short_to_be_rescaled_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="got 2 for 10 steps: give rescale=False"):
        Schedule.linear(10)
    assert Schedule.linear(10, rescale=False).num_train_timesteps == 10


def test_increasing_alphas_cumprod_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Schedule.from_alphas_cumprod([0.5, 0.6])


def test_zero_terminal_snr_of_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 timesteps; got 1"):
        Schedule.linear(1).zero_terminal_snr()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Schedule.linear(10, math.nan), ValueError, "beta_start must be finite.*got nan"),
        (lambda: Schedule.linear(10, 1e-4, math.inf), ValueError, "beta_end must be finite"),
        (lambda: Schedule.linear(10, "0.1"), TypeError, "beta_start must be .* got str '0.1'"),
        (lambda: Schedule.linear(10, True), TypeError, "beta_start must be .* got bool True"),
        (lambda: Schedule.scaled_linear(10, -0.1), ValueError, r"beta_start must be in \[0, 1\]"),
        (lambda: Schedule.scaled_linear(10, 0.1, 2.0), ValueError, r"beta_end must .*got 2\.0"),
        (lambda: Schedule.sigmoid_beta(10, 0.1, math.nan), ValueError, "beta_end must be finite"),
        (lambda: Schedule.cosine(10, math.nan), ValueError, "offset must be finite.*got nan"),
        (lambda: Schedule.cosine(10, -1), ValueError, r"offset must be in \[0, 1e\+06\); got -1"),
        (lambda: Schedule.cosine(10, 1e30), ValueError, r"offset must be in .*got 1e\+30"),
        (lambda: Schedule.sigmoid_alpha(10, tau=0), ValueError, r"tau must be positive; got 0\.0"),
        (lambda: Schedule.sigmoid_alpha(10, tau=math.nan), ValueError, "tau must be finite"),
        (lambda: Schedule.sigmoid_alpha(10, 2.0, 2.0), ValueError, "must differ; got start, end"),
        (lambda: Schedule.sigmoid_alpha(10, -3, 3, 1e-5), ValueError, "curve must be positive"),
        (lambda: Schedule.keras(10, 1.5), ValueError, "max_signal_rate <= 1; got .* 1.5"),
        (lambda: Schedule.keras(10, 0.1, 0.5), ValueError, "min_signal_rate < max_signal_rate"),
        (lambda: Schedule.keras(10, math.nan), ValueError, "max_signal_rate must be finite"),
        (lambda: Schedule.from_betas([0.1, 0.2j]), TypeError, "betas must be real; got torch.comp"),
        (lambda: Schedule(torch.ones(3).cfloat() / 9), TypeError, "betas must be real"),
        (lambda: Schedule.from_betas(None), TypeError, "betas must be a tensor .*got NoneType"),
        (lambda: Schedule.from_betas("0.1"), TypeError, "betas must be a tensor .*got '0.1'"),
        (lambda: Schedule.from_betas([0.999] * 200), ValueError, "underflows to 0 at 102 of 0"),
        (lambda: Schedule.from_alphas_cumprod([[0.5]]), ValueError, r"a vector .*got \(1, 1\)"),
        (lambda: Schedule.from_alphas_cumprod([0.5, 0.0, 0.0]), ValueError, "only the last may"),
        (lambda: Schedule.from_alphas_cumprod([0.5, math.nan]), ValueError, "alphas_cumprod must"),
        (lambda: Schedule.from_alphas_cumprod([0.5j]), TypeError, "alphas_cumprod must be real"),
    ],
)
def test_numbers_that_are_refused(
    build: Callable[[], Schedule], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


def test_integers_of_numpy_are_integers() -> None:
    for build in ALL.values():
        assert build(np.int64(100)) == build(100)


def test_betas_keep_no_history() -> None:
    betas = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    assert not Schedule.from_betas(betas).betas.requires_grad
