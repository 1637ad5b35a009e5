"""Guidance against its formulas, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import stepfuse as sf

SCHEDULE = sf.Schedule.linear()
ABAR = SCHEDULE.alphas_cumprod
SHAPE = (2, 3, 4, 4)
EXACT = 1e-12  # float64 on both sides, a few operations a step


def model(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """A smooth stand-in for an epsilon model; ``label`` None is the unconditional one."""
    shift = 0.0 if label is None else label.to(x.dtype).view(-1, 1, 1, 1) / 10
    return torch.tanh(x + shift) * (0.5 + t.to(x.dtype).view(-1, 1, 1, 1) / 2000)


def sampler(**settings: Any) -> sf.Sampler:
    return sf.Sampler(model, SCHEDULE, steps=5, clip_sample=None, dtype=torch.float64, **settings)


CONDITION = {"label": torch.tensor([1.0, 4.0])}


def ddim_to(x: Tensor, eps: Tensor, t: int, s: int | None) -> Tensor:
    a, b = ABAR[t], ABAR[s] if s is not None else torch.ones(())
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return b.sqrt() * x0 + (1 - b).sqrt() * eps


def run(guided: sf.Sampler, **more: Any) -> list[sf.Step]:
    x_T = torch.linspace(-2, 2, 96, dtype=torch.float64).view(SHAPE)
    return list(guided.iterate(SHAPE, x_T=x_T, condition=CONDITION, **more))


def outputs(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    times = torch.full((2,), t)
    return model(x, times, **CONDITION), model(x, times)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_cfg_extrapolates_from_the_unconditional_output(scale: float, batched: bool) -> None:
    unconditional = {"label": torch.zeros(1) if batched else None}
    guided = sampler(guidance=sf.CFG(scale, unconditional, batched=batched))
    x = torch.linspace(-2, 2, 96, dtype=torch.float64).view(SHAPE)
    for step, s in zip(run(guided), [*guided.timesteps[1:], None], strict=True):
        cond, uncond = outputs(x, step.t)
        x = ddim_to(x, uncond + scale * (cond - uncond), step.t, s)
        torch.testing.assert_close(step.x, x, rtol=EXACT, atol=EXACT)


def test_scale_one_costs_one_evaluation_and_any_other_two() -> None:
    calls = []

    def counting(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        calls.append(len(x))
        return model(x, t, label)

    for scale, evaluations in ((1.0, 5), (2.0, 10)):
        calls.clear()
        guidance = sf.CFG(scale, {"label": None})
        one = sf.Sampler(counting, SCHEDULE, steps=5, guidance=guidance, graph=None)
        one.sample(SHAPE, condition=CONDITION)
        assert len(calls) == one.num_function_evaluations == evaluations


def test_interval_guides_only_inside() -> None:
    guided = sampler(guidance=sf.CFG(3.0, {"label": None}, interval=(200, 600)))
    assert guided.timesteps == [800, 600, 400, 200, 0]
    x = torch.linspace(-2, 2, 96, dtype=torch.float64).view(SHAPE)
    for step, s in zip(run(guided), [*guided.timesteps[1:], None], strict=True):
        cond, uncond = outputs(x, step.t)
        eps = uncond + 3 * (cond - uncond) if 200 <= step.t <= 600 else cond
        x = ddim_to(x, eps, step.t, s)
        torch.testing.assert_close(step.x, x, rtol=EXACT, atol=EXACT)
    assert guided.num_function_evaluations == 8


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_pulls_the_standard_deviation_back(phi: float) -> None:
    guided = sampler(guidance=sf.CFG(4.0, {"label": None}, rescale=phi))
    x = torch.linspace(-2, 2, 96, dtype=torch.float64).view(SHAPE)
    for step, s in zip(run(guided), [*guided.timesteps[1:], None], strict=True):
        cond, uncond = outputs(x, step.t)
        mixed = uncond + 4 * (cond - uncond)
        for n in range(2):
            rescaled = mixed[n] * (cond[n].std() / mixed[n].std())
            mixed[n] = phi * rescaled + (1 - phi) * mixed[n]
        x = ddim_to(x, mixed, step.t, s)
        torch.testing.assert_close(step.x, x, rtol=EXACT, atol=EXACT)


def log_probability(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return -(x - label.view(-1, 1, 1, 1)).square().flatten(1).sum(1) / 8


def gradient(x: Tensor) -> Tensor:
    return -(x - CONDITION["label"].view(-1, 1, 1, 1)) / 4


def as_prediction(prediction_type: str) -> Any:
    """The same model, saying its epsilon as x0 or v."""

    def predict(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        a = ABAR[t].view(-1, 1, 1, 1)
        eps = model(x, t, label)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0,
        }[prediction_type]

    return predict


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("returns", ["log_probability", "gradient"])
def test_classifier_guidance_shifts_epsilon_in_ddim(returns: str, prediction_type: str) -> None:
    def fn(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return log_probability(x, t, label) if returns == "log_probability" else gradient(x)

    guided = sf.Sampler(
        as_prediction(prediction_type),
        SCHEDULE,
        steps=5,
        clip_sample=None,
        dtype=torch.float64,
        prediction_type=prediction_type,
        guidance=sf.ClassifierGuidance(fn, 1.5, returns),
    )
    x = torch.linspace(-2, 2, 96, dtype=torch.float64).view(SHAPE)
    for step, s in zip(run(guided), [*guided.timesteps[1:], None], strict=True):
        eps = outputs(x, step.t)[0] - 1.5 * (1 - ABAR[step.t]).sqrt() * gradient(x)
        x = ddim_to(x, eps, step.t, s)
        torch.testing.assert_close(step.x, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_classifier_guidance_shifts_the_mean_in_ddpm(variance_type: str) -> None:
    settings = {"method": "ddpm", "variance_type": variance_type}
    plain = sampler(**settings)
    guided = sampler(guidance=sf.ClassifierGuidance(log_probability, 2.0), **settings)
    noise = torch.zeros(5, *SHAPE, dtype=torch.float64)
    x = torch.linspace(-2, 2, 96, dtype=torch.float64).view(SHAPE)
    for i, step in enumerate(run(guided, noise=noise)):
        a = ABAR[step.t]
        b = ABAR[guided.timesteps[i + 1]] if i < 4 else torch.ones((), dtype=torch.float64)
        beta = 1 - a / b
        variance = (1 - b) / (1 - a) * beta if variance_type == "fixed_small" else beta
        if variance_type == "fixed_large" and i == 4:
            previous = ABAR[guided.timesteps[3]]
            variance = (1 - a) / (1 - previous) * (1 - previous / a)
        eps = outputs(x, step.t)[0]
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        mean = b.sqrt() * beta / (1 - a) * x0 + (a / b).sqrt() * (1 - b) / (1 - a) * x
        x = mean + 2 * variance * gradient(x)
        torch.testing.assert_close(step.x, x, rtol=EXACT, atol=EXACT)
    assert plain.num_function_evaluations == guided.num_function_evaluations == 5


def test_classifier_guidance_uses_the_learned_variance() -> None:
    half = torch.linspace(-3, -1, 48, dtype=torch.float64).view(1, 3, 4, 4)

    def learned(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.cat([model(x, t, label), half.expand_as(x)], dim=1)

    settings = {"method": "ddpm", "variance_type": "learned", "steps": 5, "clip_sample": None}
    settings |= {"dtype": torch.float64}
    guidance = sf.ClassifierGuidance(log_probability, 2.0)
    x_T = torch.linspace(-2, 2, 96, dtype=torch.float64).view(SHAPE)
    call = {"x_T": x_T, "condition": CONDITION, "noise": torch.zeros(5, *SHAPE)}
    plain = next(sf.Sampler(learned, SCHEDULE, **settings).iterate(SHAPE, **call))
    guided = next(
        sf.Sampler(learned, SCHEDULE, guidance=guidance, **settings).iterate(SHAPE, **call)
    )
    shift = 2 * half.exp() * gradient(x_T)
    torch.testing.assert_close(guided.x - plain.x, shift, rtol=1e-10, atol=1e-10)


def test_batched_guidance_needs_tensors_on_both_sides() -> None:
    guided = sampler(guidance=sf.CFG(2.0, {"label": None}, batched=True))
    with pytest.raises(ValueError, match="unconditional 'label'; got None"):
        run(guided)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sf.CFG(2.0, rescale=1.5), r"rescale must be in \[0, 1\]; got 1.5"),
        (lambda: sf.CFG(2.0, interval=(5, 2)), r"interval.*got \(5, 2\)"),
        (lambda: sf.ClassifierGuidance(gradient, 1.0, "score"), "returns must be.*'score'"),
    ],
)
def test_bad_guidance_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
