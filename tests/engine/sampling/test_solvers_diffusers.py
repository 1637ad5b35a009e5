"""Rows of every solver against whole loops of diffusers' schedulers, with a nonlinear model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_lcm,
    scheduling_tcd,
)
from tests.engine.sampling.rows_case import distance, run
from torch import Tensor

from stepfuse.engine.sampling.methods.euler import euler
from stepfuse.engine.sampling.methods.euler_a import euler_a
from stepfuse.engine.sampling.methods.heun import heun
from stepfuse.engine.sampling.methods.lcm import lcm
from stepfuse.engine.sampling.methods.plms import plms
from stepfuse.engine.sampling.methods.tcd import tcd
from stepfuse.engine.sampling.methods.unipc import unipc
from stepfuse.engine.sampling.multistep import dpmpp
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms, table

SHAPE = (2, 3, 5, 3)
# Their loops run in float64, with the float32 sigmas as they are: what is left is rounding, which
# steps amplify that extrapolate. In float32, where both round, they are as near as below.
EXACT = 1e-10
FLOAT32 = 2e-6
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 2, 3, 5, 14, 16, 30)
GRIDS: list[dict[str, Any]] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"final_sigmas_type": "sigma_min"},
]
NAMES = ["linspace", "karras", "exponential", "beta", "trailing", "leading", "sigma_min"]


def model(x: Tensor, t: Tensor) -> Tensor:
    """Nothing in particular: nonlinear in x, another at every t, and contracting."""
    phase = 0.01 * t.to(x.dtype).view(-1, 1, 1, 1)
    return torch.sin(1.5 * x + phase) * 0.5 + 0.3 * x


@pytest.fixture
def start() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(100, *SHAPE, dtype=torch.float64)


class Double:
    """PyTorch, for schedulers that turn x into float32."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, "float64" if name == "float32" else name)


@pytest.fixture(autouse=True)
def in_float64(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.name.startswith("test_float32"):
        for module in (
            scheduling_dpmsolver_multistep,
            scheduling_euler_discrete,
            scheduling_euler_ancestral_discrete,
            scheduling_flow_match_euler_discrete,
        ):
            monkeypatch.setattr(module, "torch", Double())


def doubled(scheduler: Any) -> Any:
    """Let its coefficients be float64."""
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, torch.as_tensor(getattr(scheduler, name)).double())
    return scheduler


def loop(scheduler: Any, x: Tensor, scaled: bool = False, **settings: Any) -> Tensor:
    """Their loop; the model is given their own timesteps."""
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if scaled else x
        out = model(given, t.expand(len(x)))
        x = scheduler.step(out, t, x, **settings).prev_sample
    return x


def patch_noise(monkeypatch: pytest.MonkeyPatch, module: Any, noise: Tensor) -> None:
    drawn: Iterator[Tensor] = iter(noise)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))


def points_of(scheduler: Any) -> Points:
    """On the circle, at their sigmas."""
    return Points.of_sigmas(scheduler.timesteps, scheduler.sigmas)


def compare(
    scheduler: Any,
    terms: Callable[[Points], list[Terms]],
    x: Tensor,
    noise: Tensor | None = None,
    points: Points | None = None,
    near: float = EXACT,
    **settings: Any,
) -> None:
    points = points or points_of(scheduler)
    expected = loop(doubled(scheduler), x, **settings)
    rows = table(points, terms(points), scheduler.config.prediction_type, None)
    assert distance(run(rows, model, x, noise), expected) < near


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("config", GRIDS, ids=NAMES)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
def test_dpmpp(
    sde: bool,
    kind: str,
    order: int,
    config: dict[str, Any],
    prediction: str,
    start: Tensor,
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for steps in STEPS if prediction == "epsilon" else (6,):
        if steps == 1 and "use_karras_sigmas" in config:
            continue
        patch_noise(monkeypatch, scheduling_dpmsolver_multistep, noise)
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SD,
            algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
            solver_order=order,
            solver_type=kind,
            prediction_type=prediction,
            **config,
        )
        scheduler.set_timesteps(steps)
        compare(
            scheduler,
            lambda points: dpmpp(points, order, kind, stochastic=sde),
            start,
            noise if sde else None,
        )


def test_dpmpp_with_euler_at_the_end(start: Tensor) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD, euler_at_final=True, solver_order=3, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(20)
    compare(scheduler, lambda p: dpmpp(p, 3, euler_at_final=True), start)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("config", GRIDS, ids=NAMES)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
def test_unipc(
    kind: str, order: int, config: dict[str, Any], prediction: str, start: Tensor
) -> None:
    if kind == "bh1" and "final_sigmas_type" not in config:
        config = {**config, "final_sigmas_type": "sigma_min"}  # NaN there with sigma 0
    for steps in STEPS if prediction == "epsilon" else (6,):
        if steps == 1 and "use_karras_sigmas" in config:
            continue
        scheduler = diffusers.UniPCMultistepScheduler(
            **SD, solver_order=order, solver_type=kind, prediction_type=prediction, **config
        )
        scheduler.set_timesteps(steps)
        compare(scheduler, lambda points: unipc(points, order, kind), start)


@pytest.mark.parametrize("off", [[0], [0, 1, 2], list(range(20))])
def test_unipc_without_a_corrector(off: list[int], start: Tensor) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**SD, solver_order=3, disable_corrector=off)
    scheduler.set_timesteps(9)
    compare(scheduler, lambda points: unipc(points, 3, disable_corrector=off), start)


def test_unipc_bh1_ends_at_x0(start: Tensor) -> None:
    """Theirs is NaN at sigma 0; here the last step is the limit."""
    scheduler = diffusers.UniPCMultistepScheduler(**SD, solver_type="bh1")
    scheduler.set_timesteps(10)
    assert bool(loop(scheduler, start).isnan().any())
    points = points_of(scheduler)
    rows = table(points, unipc(points, 2, "bh1"), "epsilon", None)
    assert bool(run(rows, model, start).isfinite().all())


EULER_GRIDS: list[dict[str, Any]] = [
    {},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]


def in_units_of_x0(scheduler: Any) -> Points:
    """x = x0 + sigma eps, as their Euler and Heun have it, of every point once."""
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])
    times = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2]])
    return Points(times, torch.ones_like(sigmas), sigmas)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", EULER_GRIDS)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_euler(steps: int, config: dict[str, Any], prediction: str, start: Tensor) -> None:
    """Here x is in the scale of the network and nothing scales it; there it is x / signal."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD, prediction_type=prediction, **config)
    scheduler.set_timesteps(steps)
    large = start * scheduler.init_noise_sigma
    expected = loop(doubled(scheduler), large, scaled=True)
    points = points_of(scheduler)
    rows = table(points, euler(points), prediction, None)
    first = large * points.signal[0]
    assert distance(run(rows, model, first), expected) < EXACT
    # and in their scale, the model scaling by itself
    theirs = Points(points.timesteps, torch.ones_like(points.signal), scheduler.sigmas)
    rows = table(theirs, euler(theirs), prediction, None)
    scales = {
        float(t): (s**2 + 1) ** 0.5
        for t, s in zip(points.timesteps, scheduler.sigmas[:-1], strict=True)
    }
    found = run(rows, lambda x, t: model(x / scales[float(t[0])], t), large)
    assert distance(found, expected) < EXACT


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", EULER_GRIDS[:3])
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_euler_ancestral(
    steps: int,
    config: dict[str, Any],
    prediction: str,
    start: Tensor,
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch_noise(monkeypatch, scheduling_euler_ancestral_discrete, noise)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **SD, prediction_type=prediction, **config
    )
    scheduler.set_timesteps(steps)
    large = start * scheduler.init_noise_sigma
    expected = loop(doubled(scheduler), large, scaled=True)
    points = points_of(scheduler)
    rows = table(points, euler_a(points), prediction, None)
    found = run(rows, model, large * points.signal[0], noise)
    assert distance(found, expected) < EXACT


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", EULER_GRIDS)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_heun(steps: int, config: dict[str, Any], prediction: str, start: Tensor) -> None:
    scheduler = diffusers.HeunDiscreteScheduler(**SD, prediction_type=prediction, **config)
    scheduler.set_timesteps(steps)
    large = start * scheduler.init_noise_sigma
    expected = loop(doubled(scheduler), large, scaled=True)
    theirs = in_units_of_x0(scheduler)
    points = Points.of_sigmas(theirs.timesteps, theirs.noise)
    assert len(points) == steps
    rows = table(points, heun(points), prediction, None)
    assert len(rows) == 2 * steps - 1
    assert distance(run(rows, model, large * points.signal[0]), expected) < EXACT
    # the same rows in their scale
    rows = table(theirs, heun(theirs), prediction, None)
    scales = {
        float(t): (s**2 + 1) ** 0.5
        for t, s in zip(theirs.timesteps, theirs.noise[:-1], strict=True)
    }
    found = run(rows, lambda x, t: model(x / scales[float(t[0])], t), large)
    assert distance(found, expected) < EXACT


def chain(scheduler: Any, times: Tensor, last: Tensor) -> Points:
    """At their abar, float32."""
    abar = torch.cat([scheduler.alphas_cumprod[times.long()].double(), last.double().view(1)])
    return Points(times, abar.sqrt(), (1 - abar).sqrt())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 20])
@pytest.mark.parametrize("to_one", [True, False])
def test_plms(to_one: bool, steps: int, prediction: str, start: Tensor) -> None:
    scheduler = diffusers.PNDMScheduler(
        **SD,
        skip_prk_steps=True,
        prediction_type=prediction,
        set_alpha_to_one=to_one,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    times = torch.as_tensor(scheduler.timesteps)
    points = chain(
        scheduler, torch.cat([times[:1], times[2:]]), torch.as_tensor(scheduler.final_alpha_cumprod)
    )
    compare(scheduler, lambda p: plms(p, prediction), start, points=points)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm(
    steps: int, prediction: str, start: Tensor, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_noise(monkeypatch, scheduling_lcm, noise)
    scheduler = diffusers.LCMScheduler(**SD, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    points = chain(scheduler, scheduler.timesteps, torch.ones(()))
    # the timestep over sigma_data, and so c_skip and c_out, are float32
    compare(scheduler, lcm, start, noise, points=points, near=FLOAT32)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_tcd(
    steps: int,
    prediction: str,
    eta: float,
    start: Tensor,
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch_noise(monkeypatch, scheduling_tcd, noise)
    scheduler = diffusers.TCDScheduler(**SD, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    # theirs ends at index 0
    ends = torch.cat([scheduler.timesteps[1:], torch.zeros(1, dtype=torch.int64)])
    middle = scheduler.alphas_cumprod[((1 - eta) * ends).floor().long()].double()
    points = chain(scheduler, scheduler.timesteps, scheduler.alphas_cumprod[0])
    between = (middle.sqrt(), (1 - middle).sqrt())
    compare(scheduler, lambda p: tcd(p, between, prediction), start, noise, points=points, eta=eta)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_flow_matching(steps: int, shift: float, start: Tensor) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = doubled(scheduler).sigmas
    points = Points(scheduler.timesteps, 1 - sigmas, sigmas)
    expected = start
    for t in scheduler.timesteps:
        expected = scheduler.step(model(expected, t.expand(2)), t, expected).prev_sample
    rows = table(points, euler(points), "flow_prediction", None)
    assert distance(run(rows, model, start), expected) < EXACT


@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_solvers_on_flow_sigmas(order: int, start: Tensor) -> None:
    config = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    for kind, terms in (
        (diffusers.DPMSolverMultistepScheduler, dpmpp),
        (diffusers.UniPCMultistepScheduler, unipc),
    ):
        scheduler = kind(solver_order=order, **config)
        scheduler.set_timesteps(8)
        sigmas = scheduler.sigmas.double()
        points = Points(scheduler.timesteps, 1 - sigmas, sigmas)
        compare(scheduler, lambda p, f=terms: f(p, order), start, points=points)


@pytest.mark.parametrize("config", GRIDS, ids=NAMES)
@pytest.mark.parametrize("name", ["dpmpp 2", "dpmpp 3", "unipc 2", "unipc 3"])
def test_float32_loops(name: str, config: dict[str, Any], start: Tensor) -> None:
    """Their float32 loop and ours, of float64 coefficients."""
    kind, order = name.split()
    theirs, terms = {
        "dpmpp": (diffusers.DPMSolverMultistepScheduler, dpmpp),
        "unipc": (diffusers.UniPCMultistepScheduler, unipc),
    }[kind]
    scheduler = theirs(**SD, solver_order=int(order), **config)
    scheduler.set_timesteps(10)
    expected = loop(scheduler, start.float())
    points = points_of(scheduler)
    rows = table(points, terms(points, int(order)), "epsilon", None)
    assert distance(run(rows, model, start.float()), expected) < FLOAT32
