"""``strict=False``: the rows of `stepfuse.engine.sampling.rows` instead of diffusers' rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.adapters.schedulers_case import OURS, pair
from torch import Tensor

from stepfuse.engine.sampling.plan import inversion_table, step_table
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.denoise_step import denoise_step

SCHEDULE = Schedule.linear(1000, rescale=False)
SHAPE = (2, 2, 3, 5)
EXACT = 1e-10  # both are float64


def draw(i: int, channels: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(2, channels, 3, 5, generator=generator, dtype=torch.float64)


def loop(scheduler: Any, channels: int = 2, **kwargs: Any) -> list[Tensor]:
    x, result = draw(0), []
    if not isinstance(scheduler, OURS["DDIMInverseScheduler"]):
        kwargs["generator"] = torch.Generator().manual_seed(7)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(draw(i + 1, channels), t, x, **kwargs).prev_sample
        result.append(x)
    return result


def by_table(table: Tensor, noisy: bool, channels: int = 2) -> list[Tensor]:
    """The same loop by a table of this project, noise drawn where a row has any."""
    generator, x, result = torch.Generator().manual_seed(7), draw(0), []
    for i, row in enumerate(table):
        noise = None
        if noisy and float(row[5]) > 0:
            noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        x = denoise_step(
            x,
            draw(i + 1, channels),
            table,
            i,
            noise=noise,
            learned_variance=channels == 4 and noise is not None,
            backend="reference",
        )
        result.append(x)
    return result


def same(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [30, 13])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clipped", [True, False])
def test_ddim_goes_to_the_next_entry(
    prediction: str, steps: int, to_one: bool, clipped: bool
) -> None:
    scheduler = OURS["DDIMScheduler"](
        prediction_type=prediction,
        timestep_spacing="trailing",
        set_alpha_to_one=to_one,
        strict=False,
    )
    scheduler.set_timesteps(steps)
    update = Update(
        prediction_type=prediction,
        rederive_epsilon=clipped,
        final_alpha_one=to_one,
    )
    table = step_table(SCHEDULE, scheduler.timesteps.tolist(), update)
    same(loop(scheduler, use_clipped_model_output=clipped), by_table(table, noisy=False))


KINDS = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned": "learned",
    "learned_range": "learned_range",
}


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_adds_no_noise_in_the_last_step(kind: str, spacing: str) -> None:
    scheduler = OURS["DDPMScheduler"](variance_type=kind, timestep_spacing=spacing, strict=False)
    scheduler.set_timesteps(8)
    channels = 4 if kind.startswith("learned") else 2
    update = Update(
        method="ddpm", variance_type=KINDS[kind], variance_at_zero="clamp", rederive_epsilon=False
    )
    table = step_table(SCHEDULE, scheduler.timesteps.tolist(), update)
    same(loop(scheduler, channels), by_table(table, noisy=True, channels=channels))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_inverse_starts_at_the_entry_before(prediction: str) -> None:
    scheduler = OURS["DDIMInverseScheduler"](
        prediction_type=prediction, timestep_spacing="trailing", strict=False
    )
    scheduler.set_timesteps(30)
    update = Update(prediction_type=prediction, rederive_epsilon=False)
    down = scheduler.timesteps.flip(0).tolist()
    same(loop(scheduler), by_table(inversion_table(SCHEDULE, down, update, "target"), False))


@pytest.mark.parametrize("name", OURS)
def test_indices_outside_the_schedule_are_left_out(name: str) -> None:
    theirs, _ = pair(name, steps_offset=1)
    ours = OURS[name](steps_offset=1, strict=False)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(1000)
    assert 1000 in theirs.timesteps
    assert sorted(ours.timesteps.tolist()) == list(range(1, 1000))
    theirs, _ = pair(name, timestep_spacing="trailing")
    ours = OURS[name](timestep_spacing="trailing", strict=False)
    counts = []
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        if -1 in theirs.timesteps:
            counts.append(steps)
            ours.set_timesteps(steps)
            assert len(ours.timesteps) == steps
            assert int(ours.timesteps.min()) >= 0
    assert len(counts) > 10


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_epsilon_at_zero_signal_is_refused(name: str) -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = OURS[name](**config, strict=False)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="no step starts at timestep 999"):
        scheduler.step(draw(1), 999, draw(0))
    scheduler = OURS[name](**config, strict=False, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    assert loop(scheduler)[-1].isfinite().all()


def test_the_inverse_of_a_model_of_x0_is_refused() -> None:
    scheduler = OURS["DDIMInverseScheduler"](prediction_type="sample", strict=False)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        scheduler.step(draw(1), 0, draw(0))


def test_a_first_beta_of_0_is_no_nan() -> None:
    """abar_0 = 1: theirs divides 0 by 0 there."""
    for name in ("DDIMScheduler", "DDPMScheduler"):
        theirs, _ = pair(name, beta_start=0.0)
        ours = OURS[name](beta_start=0.0, strict=False)
        results = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(4)
            results.append(scheduler.step(draw(1), 0, draw(0)).prev_sample)
        assert results[0].isnan().all()
        torch.testing.assert_close(results[1], draw(0).clamp(-1, 1), rtol=1e-5, atol=1e-5)


def test_switched_on_an_object() -> None:
    theirs, ours = pair("DDPMScheduler", timestep_spacing="trailing", variance_type="fixed_large")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
    before = ours.step(draw(1), 199, draw(0), generator=torch.manual_seed(0)).prev_sample
    ours.strict = False
    after = ours.step(draw(1), 199, draw(0), generator=torch.manual_seed(0)).prev_sample
    assert (before - after).abs().max() > 1e-3
    other = ours.step(draw(1), 199, draw(0), generator=torch.manual_seed(1)).prev_sample
    assert torch.equal(after, other)
