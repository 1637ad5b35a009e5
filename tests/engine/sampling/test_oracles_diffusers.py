"""Whole trajectories against diffusers' schedulers, with the same model and the same noise.

With our float64 alphas_cumprod in the place of their float32 table the two agree to rounding; with
their own tables to what float32 allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor

from stepfuse import Sampler, Schedule

LINEAR = Schedule.linear()
STEPS = 10
SHAPE = (2, 3, 4, 4)
EXACT = 1e-9  # float64: rounding, amplified by 1 / sqrt(abar) = 50 and a model of slope 2
NATIVE = 2e-4  # their cumprod is float32: 3e-5 relative at abar_T, as a shift of every x0

Model = Callable[..., Tensor]


@pytest.fixture
def start() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64)


@pytest.fixture
def noise(start: Tensor) -> Tensor:
    return torch.randn(STEPS, *SHAPE, dtype=torch.float64)


def build(kind: type, exact: bool = True, schedule: Schedule = LINEAR, **config: Any) -> Any:
    """A scheduler of theirs, at STEPS timesteps."""
    scheduler = kind(beta_start=1e-4, beta_end=0.02, **config)
    if exact:
        abar = schedule.alphas_cumprod
        scheduler.alphas_cumprod = abar
        end = torch.ones((), dtype=torch.float64)
        if not config.get("set_alpha_to_one", True):
            end = abar[0]
        scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = end
    scheduler.set_timesteps(STEPS)
    return scheduler


def ddim_loop(scheduler: Any, model: Model, x: Tensor, noise: Tensor, **settings: Any) -> Tensor:
    for z, t in zip(noise, scheduler.timesteps, strict=True):
        if settings.get("eta"):
            settings["variance_noise"] = z
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **settings).prev_sample
    return x


def ddpm_loop(
    scheduler: Any, model: Model, x: Tensor, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    drawn: Iterator[Tensor] = iter(noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(drawn))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("to_one", [True, False], ids=["to x_0", "to abar_0"])
@pytest.mark.parametrize("rederive", [True, False], ids=["rederived", "raw"])
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "free"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim(
    prediction: str,
    eta: float,
    clip: bool,
    rederive: bool,
    to_one: bool,
    start: Tensor,
    noise: Tensor,
) -> None:
    offset = 0 if to_one else 1  # Stable Diffusion goes to abar_0 from index 1
    scheduler = build(
        DDIMScheduler,
        clip_sample=clip,
        set_alpha_to_one=to_one,
        prediction_type=prediction,
        steps_offset=offset,
    )
    model = Bumpy()
    expected = ddim_loop(scheduler, model, start, noise, eta=eta, use_clipped_model_output=rederive)
    sampler = Sampler(
        model,
        LINEAR,
        steps=STEPS,
        steps_offset=offset,
        eta=eta,
        prediction_type=prediction,
        clip_sample=1.0 if clip else None,
        rederive_epsilon=rederive,
        final_alpha_one=to_one,
        dtype=torch.float64,
        graph=None,
    )
    ours = sampler.sample(SHAPE, x_T=start, noise=noise)
    torch.testing.assert_close(ours, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "free"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm(
    prediction: str,
    variance: str,
    clip: bool,
    start: Tensor,
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Bumpy(variance)

    def theirs(x: Tensor, t: Tensor) -> Tensor:
        out = model(x, t)
        if variance == "learned":  # a variance there, a log variance here and in improved DDPM
            out[:, 3:] = out[:, 3:].exp()
        return out

    scheduler = build(
        DDPMScheduler, variance_type=variance, clip_sample=clip, prediction_type=prediction
    )
    expected = ddpm_loop(scheduler, theirs, start, noise, monkeypatch)
    sampler = Sampler(
        model,
        LINEAR,
        method="ddpm",
        steps=STEPS,
        variance_type=variance,
        prediction_type=prediction,
        clip_sample=1.0 if clip else None,
        dtype=torch.float64,
    )
    ours = sampler.sample(SHAPE, x_T=start, noise=noise)
    torch.testing.assert_close(ours, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_their_own_tables(
    name: str, theirs: str, eta: float, start: Tensor, noise: Tensor
) -> None:
    scheduler = build(DDIMScheduler, exact=False, beta_schedule=theirs)
    schedule = getattr(Schedule, name)(
        **({} if name == "cosine" else {"beta_start": 1e-4, "beta_end": 0.02})
    )
    x, z = start.float(), noise.float()
    expected = ddim_loop(scheduler, Bumpy(), x, z, eta=eta, use_clipped_model_output=True)
    ours = Sampler(Bumpy(), schedule, steps=STEPS, eta=eta).sample(SHAPE, x_T=x, noise=z)
    torch.testing.assert_close(ours, expected, rtol=0, atol=NATIVE)


def test_ddpm_with_their_own_tables(
    start: Tensor, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, z = start.float(), noise.float()
    expected = ddpm_loop(build(DDPMScheduler, exact=False), Bumpy(), x, z, monkeypatch)
    sampler = Sampler(Bumpy(), LINEAR, method="ddpm", steps=STEPS)
    torch.testing.assert_close(sampler.sample(SHAPE, x_T=x, noise=z), expected, rtol=0, atol=NATIVE)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_zero_terminal_snr(eta: float, start: Tensor, noise: Tensor) -> None:
    schedule = LINEAR.zero_terminal_snr()
    config = {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    scheduler = build(DDIMScheduler, schedule=schedule, clip_sample=False, **config)
    assert scheduler.timesteps[0] == 999
    expected = ddim_loop(scheduler, Bumpy(), start, noise, eta=eta)
    sampler = Sampler(
        Bumpy(),
        schedule,
        steps=STEPS,
        spacing="trailing",
        eta=eta,
        prediction_type="v_prediction",
        clip_sample=None,
        dtype=torch.float64,
    )
    ours = sampler.sample(SHAPE, x_T=start, noise=noise)
    torch.testing.assert_close(ours, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "free"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion(prediction: str, clip: bool, start: Tensor) -> None:
    scheduler = build(DDIMInverseScheduler, clip_sample=clip, prediction_type=prediction)
    image = start.clamp(-1, 1)
    expected = image
    for t in scheduler.timesteps:
        out = Bumpy()(expected, t.expand(len(image)))
        expected = scheduler.step(out, t, expected).prev_sample
    sampler = Sampler(
        Bumpy(),
        LINEAR,
        steps=STEPS,
        prediction_type=prediction,
        rederive_epsilon=False,
        dtype=torch.float64,
    )
    ours = sampler.encode(image, convention="target", clip_sample=1.0 if clip else None)
    torch.testing.assert_close(ours, expected, rtol=EXACT, atol=EXACT)


def test_where_the_two_part() -> None:
    """They step from t to t - T // S, we to the next entry of the list."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(30)
    theirs = [int(t) - 1000 // 30 for t in scheduler.timesteps[:-1]]
    ours = Sampler(Bumpy(), LINEAR, steps=30, spacing="trailing").timesteps
    assert ours == scheduler.timesteps.tolist()
    assert sum(a != b for a, b in zip(theirs, ours[1:], strict=True)) == 10


def dummy_sample() -> Tensor:
    """The input of diffusers' own scheduler tests."""
    count = 4 * 3 * 8 * 8
    return (torch.arange(count).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


def dummy_model(x: Tensor, t: Tensor) -> Tensor:
    """Their model."""
    return x * (t / (t + 1)).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("prediction", "expected"), [("epsilon", 172.0067), ("v_prediction", 52.5302)]
)
def test_the_sums_of_their_own_ddim_tests(prediction: str, expected: float) -> None:
    sampler = Sampler(
        dummy_model, LINEAR, steps=10, prediction_type=prediction, rederive_epsilon=False
    )
    x = sampler.sample((4, 3, 8, 8), x_T=dummy_sample())
    assert float(x.abs().sum()) == pytest.approx(expected, abs=1e-2)  # their own tolerance


@pytest.mark.parametrize(
    ("prediction", "expected"), [("epsilon", 258.9606), ("v_prediction", 202.0296)]
)
def test_the_sums_of_their_own_ddpm_tests(prediction: str, expected: float) -> None:
    generator = torch.manual_seed(0)
    z = torch.stack([torch.randn(4, 3, 8, 8, generator=generator) for _ in range(1000)])
    sampler = Sampler(dummy_model, LINEAR, method="ddpm", steps=1000, prediction_type=prediction)
    x = sampler.sample((4, 3, 8, 8), x_T=dummy_sample(), noise=z)
    assert float(x.abs().sum()) == pytest.approx(expected, abs=1e-2)


def test_the_sum_of_their_own_inversion_test() -> None:
    sampler = Sampler(dummy_model, LINEAR, steps=10, rederive_epsilon=False)
    x = sampler.encode(dummy_sample(), convention="target", clip_sample=1.0)
    assert float(x.abs().sum()) == pytest.approx(671.6816, abs=1e-2)
