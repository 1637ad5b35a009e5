"""The step table: every row, applied, against the step as the papers write it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepfuse import Schedule, spaced_timesteps
from stepfuse.engine.sampling import plain_loop as textbook
from stepfuse.engine.sampling.plan import Plan, inversion_table, step_table
from stepfuse.engine.sampling.steps import posterior_log_variance
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.reference import denoise_step as reference
from stepfuse.kernels.step_row import COLUMNS, Column

LINEAR = Schedule.linear()
TWENTY = spaced_timesteps(1000, 20)
EXACT = 1e-12  # float64: a dozen operations on numbers up to 1 / sqrt(abar) = 158 of them

METHODS = [
    {"method": "ddim"},
    {"method": "ddim", "eta": 0.3},
    {"method": "ddim", "eta": 1.0},
    {"method": "ddim_hat"},
    {"method": "ddpm"},
    {"method": "ddpm", "variance_type": "fixed_large"},
    {"method": "ddpm", "variance_type": "learned"},
    {"method": "ddpm", "variance_type": "learned_range"},
]
PREDICTIONS = ["epsilon", "sample", "v_prediction", "mean"]
CLIPPING = [
    {"clip_sample": None},
    {"clip_sample": 1.0},
    {"clip_sample": 0.7, "rederive_epsilon": False},
]


def name_of(settings: dict[str, object]) -> str:
    return "-".join(f"{k.split('_')[0]}:{v}" for k, v in settings.items())


def some_tensors(update: Update, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, model output and noise: [2, 3, 5]."""
    generator = torch.Generator().manual_seed(seed)
    channels = 6 if update.uses_learned_variance else 3
    x, z = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(2, channels, 5, generator=generator, dtype=torch.float64), z


def apply(row: Tensor, x: Tensor, out: Tensor, z: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    return reference.update(x, out, None, row, z, update.uses_learned_variance)


def textbook_step(leg: textbook.Leg, x: Tensor, out: Tensor, z: Tensor, update: Update) -> Tensor:
    return textbook.step(
        leg,
        x,
        out,
        z,
        method=update.method,
        eta=update.eta,
        prediction_type=update.prediction_type,
        variance_type=update.variance_type,
        clip_sample=update.clip_sample,
        rederive_epsilon=update.rederive_epsilon,
    )


@pytest.mark.parametrize("clipping", CLIPPING, ids=name_of)
@pytest.mark.parametrize(
    ("method", "prediction"),
    [*itertools.product(METHODS, PREDICTIONS), ({"method": "ddgan"}, "sample")],
    ids=lambda value: name_of(value) if isinstance(value, dict) else value,
)
def test_every_row_is_the_textbook_step(
    method: dict[str, object], prediction: str, clipping: dict[str, object]
) -> None:
    for final_alpha_one, at_zero in itertools.product((True, False), ("next", "clamp")):
        update = Update(
            **method,
            **clipping,
            prediction_type=prediction,
            final_alpha_one=final_alpha_one,
            variance_at_zero=at_zero,
        )
        table = step_table(LINEAR, TWENTY, update)
        assert table.dtype == torch.float64
        assert table.shape == (len(TWENTY), COLUMNS)
        steps = textbook.legs(LINEAR, TWENTY, final_alpha_one, at_zero)
        for i, (row, leg) in enumerate(zip(table, steps, strict=True)):
            x, out, z = some_tensors(update, seed=i)
            x_s, x0 = apply(row, x, out, z, update)
            expected = textbook_step(leg, x, out, z, update)
            torch.testing.assert_close(x_s, expected, rtol=EXACT, atol=EXACT)
            clean, _ = textbook.predictions(leg, prediction, x, out[:, :3])
            limit = math.inf if update.clip_sample is None else update.clip_sample
            # a posterior mean is divided by its small weight on x0
            near = 1e-9 if prediction == "mean" else EXACT
            torch.testing.assert_close(x0, clean.clamp(-limit, limit), rtol=EXACT, atol=near)


@pytest.mark.parametrize("spacing", ["trailing", "quadratic"])
@pytest.mark.parametrize("name", ["cosine", "sigmoid_alpha", "keras"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_other_schedules_and_spacings(method: dict[str, object], name: str, spacing: str) -> None:
    schedule = getattr(Schedule, name)(200)
    timesteps = spaced_timesteps(200, 15, spacing)
    update = Update(**method, prediction_type="v_prediction", clip_sample=1.0)
    table = step_table(schedule, timesteps, update)
    for i, (row, leg) in enumerate(zip(table, textbook.legs(schedule, timesteps), strict=True)):
        x, out, z = some_tensors(update, seed=i)
        x_s, _ = apply(row, x, out, z, update)
        expected = textbook_step(leg, x, out, z, update)
        torch.testing.assert_close(x_s, expected, rtol=EXACT, atol=EXACT)


def test_what_a_row_says_of_itself() -> None:
    table = step_table(LINEAR, TWENTY, Update(clip_sample=None))
    a = LINEAR.alphas_cumprod[TWENTY]
    b = torch.cat([a[1:], torch.ones(1, dtype=torch.float64)])
    assert table[:, Column.TIMESTEP].tolist() == TWENTY
    for column, expected in (
        (Column.SIGNAL, a.sqrt()),
        (Column.NOISE, (1 - a).sqrt()),
        (Column.SIGNAL_NEXT, b.sqrt()),
        (Column.NOISE_NEXT, (1 - b).sqrt()),
        (Column.CLIP, torch.full_like(a, math.inf)),
        (Column.GUIDANCE, torch.ones_like(a)),
    ):
        torch.testing.assert_close(table[:, column], expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("clipping", CLIPPING[:2], ids=name_of)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eta_one_over_all_timesteps_is_ddpm(prediction: str, clipping: dict[str, object]) -> None:
    every = list(range(999, -1, -1))
    ddim = Update(eta=1.0, prediction_type=prediction, **clipping)
    ddpm = Update(method="ddpm", prediction_type=prediction, **clipping)
    rows = zip(step_table(LINEAR, every, ddim), step_table(LINEAR, every, ddpm), strict=True)
    x, out, z = some_tensors(ddpm)
    for row, other in rows:
        torch.testing.assert_close(
            apply(row, x, out, z, ddim)[0], apply(other, x, out, z, ddpm)[0], rtol=EXACT, atol=EXACT
        )


def test_posterior_variance_figures_and_both_conventions_at_zero() -> None:
    every = list(range(999, -1, -1))
    following = posterior_log_variance(LINEAR, every, "next")
    clamped = posterior_log_variance(LINEAR, every, "clamp")
    expected = [8.54891152e-5, 5.45318766e-5]
    assert following[[-3, -2]].exp().tolist() == pytest.approx(expected, rel=1e-8)
    assert torch.equal(following[:-1], clamped[:-1])
    assert following[-1] == following[-2]
    assert float(clamped[-1]) == pytest.approx(math.log(1e-20), rel=1e-15)
    # with one timestep there is no step before the last
    assert posterior_log_variance(LINEAR, [999], "next").exp().tolist() == pytest.approx([1e-20])


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_the_noise_of_the_last_step(method: dict[str, object]) -> None:
    update = Update(**method, clip_sample=None)
    table = step_table(LINEAR, TWENTY, update)
    assert table[-1, Column.SIGMA] == 0
    if method == {"method": "ddim"}:
        assert not table[:, Column.SIGMA].any()
    else:
        assert bool((table[:-1, Column.SIGMA] > 0).all())


def test_variances_for_a_guided_mean() -> None:
    """Classifier guidance shifts the mean by the variance, at the last step too (ADM)."""
    steps = textbook.legs(LINEAR, TWENTY)
    beta = torch.stack([1 - leg.a / leg.b for leg in steps])
    small = torch.stack([(1 - leg.b) / (1 - leg.a) for leg in steps]) * beta
    table = step_table(LINEAR, TWENTY, Update(method="ddpm"))
    torch.testing.assert_close(table[:, Column.VARIANCE], small, rtol=1e-13, atol=0)
    large = step_table(LINEAR, TWENTY, Update(method="ddpm", variance_type="fixed_large"))
    expected = torch.cat([beta[:-1], steps[-1].log_small.exp().view(1)])
    torch.testing.assert_close(large[:, Column.VARIANCE], expected, rtol=1e-13, atol=0)


def test_sigma_hat_keeps_the_drift_of_eta_one() -> None:
    hat = step_table(LINEAR, TWENTY, Update(method="ddim_hat"))
    one = step_table(LINEAR, TWENTY, Update(eta=1.0))
    others = [c for c in range(COLUMNS) if c != Column.SIGMA]
    assert torch.equal(hat[:, others], one[:, others])
    assert bool((hat[:-1, Column.SIGMA] > one[:-1, Column.SIGMA]).all())
    assert bool(torch.isfinite(hat[:, : Column.CLIP]).all())


@pytest.mark.parametrize("prediction", ["epsilon", "mean"])
@pytest.mark.parametrize("method", ["ddim", "ddpm", "ddim_hat"])
def test_no_signal_and_no_way_to_x0_is_refused(method: str, prediction: str) -> None:
    schedule = LINEAR.zero_terminal_snr()
    update = Update(method=method, prediction_type=prediction)
    with pytest.raises(ValueError, match=rf"timestep 999.*'v_prediction'.*got '{prediction}'"):
        step_table(schedule, spaced_timesteps(1000, 10, "trailing"), update)
    # leading timesteps do not touch the last index
    assert bool(torch.isfinite(step_table(schedule, TWENTY, replace(update, clip_sample=9))).all())


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_no_signal_at_the_start(method: dict[str, object], prediction: str) -> None:
    schedule = LINEAR.zero_terminal_snr()
    timesteps = spaced_timesteps(1000, 10, "trailing")
    for clipping in CLIPPING:
        update = Update(**method, **clipping, prediction_type=prediction)
        table = step_table(schedule, timesteps, update)
        for row, leg in zip(table, textbook.legs(schedule, timesteps), strict=True):
            x, out, z = some_tensors(update)
            x_s, _ = apply(row, x, out, z, update)
            expected = textbook_step(leg, x, out, z, update)
            torch.testing.assert_close(x_s, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_steps_without_noise(method: dict[str, object], prediction: str) -> None:
    """beta = 0: nothing happens on the way, and at the first index x is x0 already."""
    schedule = Schedule.from_betas([0.0, 0.1, 0.0, 0.2])
    update = Update(**method, prediction_type=prediction)
    if prediction == "mean":
        with pytest.raises(ValueError, match=r"beta is 0 at timestep 2.*must not be 'mean'"):
            step_table(schedule, [3, 2, 1, 0], update)
        return
    table = step_table(schedule, [3, 2, 1, 0], update)
    assert bool(torch.isfinite(table).all())
    x, out, z = some_tensors(update)
    if prediction != "sample":
        torch.testing.assert_close(apply(table[-1], x, out, z, update)[0], x.clamp(-1, 1))
    if update.method == "ddim":
        free = replace(update, clip_sample=None)
        row = step_table(schedule, [3, 2, 1, 0], free)[1]
        torch.testing.assert_close(apply(row, x, out, z, free)[0], x, rtol=EXACT, atol=EXACT)


def upward(a: Tensor, b: Tensor, prediction: str, leg: textbook.Leg, clip: float | None) -> Tensor:
    """DDIM read from a to b < a, from the tensors of `some_tensors`."""
    x, out, _ = some_tensors(Update())
    x0, eps = textbook.predictions(replace(leg, a=a), prediction, x, out)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        if a < 1:
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    return b.sqrt() * x0 + (1 - b).sqrt() * eps


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_evaluated_where_x_is(prediction: str, clip: float | None) -> None:
    update = Update(prediction_type=prediction, clip_sample=clip)
    table = inversion_table(LINEAR, TWENTY, update, "current")
    up = textbook.legs(LINEAR, TWENTY)[::-1]
    assert table[:, Column.TIMESTEP].tolist() == TWENTY[:0:-1]
    x, out, z = some_tensors(update)
    for row, here, there in zip(table, up, up[1:], strict=False):
        x_s, _ = apply(row, x, out, z, update)
        expected = upward(here.a, there.a, prediction, here, clip)
        torch.testing.assert_close(x_s, expected, rtol=EXACT, atol=EXACT)
        assert row[Column.SIGMA] == 0


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion_evaluated_where_x_goes(prediction: str, clip: float | None) -> None:
    update = Update(prediction_type=prediction, clip_sample=clip)
    table = inversion_table(LINEAR, TWENTY, update, "target")
    assert table[:, Column.TIMESTEP].tolist() == TWENTY[::-1]
    a = torch.ones((), dtype=torch.float64)
    x, out, z = some_tensors(update)
    for row, leg in zip(table, textbook.legs(LINEAR, TWENTY)[::-1], strict=True):
        x_s, _ = apply(row, x, out, z, update)
        expected = upward(a, leg.a, prediction, leg, clip)
        torch.testing.assert_close(x_s, expected, rtol=EXACT, atol=EXACT)
        a = leg.a


def test_inversions_that_are_refused() -> None:
    with pytest.raises(ValueError, match="current, target; got 'here'"):
        inversion_table(LINEAR, TWENTY, Update(), "here")  # type: ignore[arg-type]
    for prediction in ("sample", "mean"):
        update = Update(prediction_type=prediction)
        with pytest.raises(ValueError, match=f"'{prediction}' says nothing of epsilon"):
            inversion_table(LINEAR, TWENTY, update, "target")


def test_one_timestep() -> None:
    table = step_table(LINEAR, [999], Update(clip_sample=None))
    assert table.shape == (1, COLUMNS)
    assert inversion_table(LINEAR, [999], Update(), "current").shape == (0, COLUMNS)
    assert inversion_table(LINEAR, [999], Update(), "target").shape == (1, COLUMNS)


def test_plan_of_an_unguided_table() -> None:
    plan = Plan.of(step_table(LINEAR, TWENTY, Update()))
    assert plan.timesteps == TWENTY
    assert plan.guided == [False] * len(TWENTY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "dpm"},
            "method must be a Method or one of ddgan, ddim, .*, unipc; got 'dpm'",
        ),
        (
            {"prediction_type": "eps"},
            "epsilon, sample, v_prediction, mean, flow_prediction; got 'eps'",
        ),
        ({"variance_type": "small"}, "fixed_small, fixed_large, learned, learned_range; got"),
        ({"variance_at_zero": "zero"}, "next, clamp; got 'zero'"),
        ({"eta": 1.5}, r"\[0, 1\]; got 1.5"),
        ({"eta": -0.1}, r"\[0, 1\]; got -0.1"),
        ({"eta": math.nan}, r"\[0, 1\]; got nan"),
        ({"eta": 0.5, "method": "ddpm"}, "method 'ddpm' takes no eta: it must be 0; got eta=0.5"),
        ({"clip_sample": 0.0}, "positive or None; got 0.0"),
        ({"clip_sample": -1.0}, "positive or None; got -1.0"),
        ({"clip_sample": math.nan}, "positive or None; got nan"),
        ({"method": "ddgan"}, "prediction_type 'sample'; got 'epsilon'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Update(**settings)
