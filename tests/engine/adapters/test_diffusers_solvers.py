"""Whole loops of the solvers against the installed diffusers classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.adapters.solvers_case import (
    NEAR,
    asked,
    assert_same,
    difference,
    exact,
    pair,
    rows_of,
    run,
    start,
)

SIGMAS: list[dict[str, Any]] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
example = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
common = {
    "beta_schedule": st.sampled_from(["linear", "scaled_linear"]),
    "beta_end": st.sampled_from([0.012, 0.02]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
}
sigmas = st.sampled_from(SIGMAS)
places = st.sampled_from([None, 0, 1, 2])  # where in the list a loop starts: thirds of it


def compare(
    name: str, config: dict[str, Any], steps: int, place: int | None, **options: Any
) -> None:
    theirs, ours = pair(name, **config)
    begin = None if place is None else place * steps // 3
    loops = [run(scheduler, steps, begin=begin, **options) for scheduler in (theirs, ours)]
    assert rows_of(ours) == 1
    # the weights of order 3 are up to 1.7 with either sign, and float32 rounds what they cancel
    near = 4 * NEAR if config.get("solver_order") == 3 else NEAR
    best = exact(pair(name, **config)[0], steps, begin=begin, **options)
    assert_same(loops[1], loops[0], best, near)
    for attribute in ("step_index", "begin_index", "num_inference_steps", "order"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert torch.equal(ours.timesteps, theirs.timesteps)


@example
@given(
    config=st.fixed_dictionaries(
        {
            **common,
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "timestep_type": st.sampled_from(["discrete", "continuous"]),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        }
    ),
    spread=sigmas,
    steps=st.integers(2, 60),
    place=places,
)
def test_euler(
    config: dict[str, Any], spread: dict[str, Any], steps: int, place: int | None
) -> None:
    compare("EulerDiscreteScheduler", {**config, **spread}, steps, place)


@example
@given(
    config=st.fixed_dictionaries(
        {**common, "prediction_type": st.sampled_from(["epsilon", "v_prediction"])}
    ),
    steps=st.integers(4, 60),
    place=places,
)
def test_euler_ancestral(config: dict[str, Any], steps: int, place: int | None) -> None:
    compare("EulerAncestralDiscreteScheduler", config, steps, place)


@example
@given(
    config=st.fixed_dictionaries(
        {
            **common,
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "solver_order": st.sampled_from([1, 2, 3]),
            "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]),
            "solver_type": st.sampled_from(["midpoint", "heun"]),
            "lower_order_final": st.booleans(),
            "euler_at_final": st.booleans(),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        }
    ),
    spread=st.sampled_from([*SIGMAS, {"use_lu_lambdas": True}]),
    steps=st.integers(1, 60),
    place=places,
)
def test_dpm_multistep(
    config: dict[str, Any], spread: dict[str, Any], steps: int, place: int | None
) -> None:
    theirs, _ = pair("DPMSolverMultistepScheduler", **config, **spread)
    theirs.set_timesteps(steps)
    if place is None and len(set(theirs.timesteps.tolist())) < len(theirs.timesteps):
        place = 0  # a loop that starts by a timestep that is there twice starts at the second
    if bool((theirs.sigmas.diff() < 0).all()):
        compare("DPMSolverMultistepScheduler", {**config, **spread}, steps, place)


@example
@given(
    config=st.fixed_dictionaries(
        {
            **common,
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "solver_order": st.sampled_from([1, 2, 3]),
            "solver_type": st.sampled_from(["bh1", "bh2"]),
            "disable_corrector": st.sampled_from([[], [0], [1, 3]]),
            "final_sigmas_type": st.just("sigma_min"),
        }
    ),
    spread=sigmas,
    steps=st.integers(1, 40),
    place=places,
)
def test_unipc(
    config: dict[str, Any], spread: dict[str, Any], steps: int, place: int | None
) -> None:
    theirs, _ = pair("UniPCMultistepScheduler", **config, **spread)
    theirs.set_timesteps(steps)
    if place is None and len(set(theirs.timesteps.tolist())) < len(theirs.timesteps):
        place = 0
    if bool((theirs.sigmas.diff() < 0).all()):
        options = {"generator": False}
        compare("UniPCMultistepScheduler", {**config, **spread}, steps, place, **options)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spread", SIGMAS, ids=["plain", "karras", "exponential", "beta"])
def test_unipc_to_a_sigma_of_zero(order: int, spread: dict[str, Any]) -> None:
    config = {"solver_order": order, **spread}
    compare("UniPCMultistepScheduler", config, 11, None, generator=False)


@example
@given(
    config=st.fixed_dictionaries(
        {
            "shift": st.sampled_from([1.0, 3.0, 0.5]),
            "shift_terminal": st.sampled_from([None, 0.1]),
        }
    ),
    spread=sigmas,
    steps=st.integers(2, 60),
    place=places,
)
def test_flow_matching(
    config: dict[str, Any], spread: dict[str, Any], steps: int, place: int | None
) -> None:
    compare("FlowMatchEulerDiscreteScheduler", {**config, **spread}, steps, place)


@example
@given(
    config=st.fixed_dictionaries(
        {
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "clip_sample": st.booleans(),
            "clip_sample_range": st.sampled_from([1.0, 0.4]),
            "timestep_scaling": st.sampled_from([10.0, 1.0]),
        }
    ),
    steps=st.integers(1, 50),
    place=places,
)
def test_lcm(config: dict[str, Any], steps: int, place: int | None) -> None:
    compare("LCMScheduler", config, steps, place)


@example
@given(
    config=st.fixed_dictionaries(
        {
            "beta_schedule": st.sampled_from(["linear", "scaled_linear"]),
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "clip_sample": st.booleans(),
        }
    ),
    steps=st.integers(1, 50),
    place=places,
    eta=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_tcd(config: dict[str, Any], steps: int, place: int | None, eta: float) -> None:
    compare("TCDScheduler", config, steps, place, eta=eta)


@example
@given(
    config=st.fixed_dictionaries(
        {
            **common,
            "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
            "clip_sample": st.booleans(),
        }
    ),
    spread=sigmas,
    steps=st.integers(6, 40),
    whole=st.sampled_from([None, 0, 1, 3]),
)
def test_heun(
    config: dict[str, Any], spread: dict[str, Any], steps: int, whole: int | None
) -> None:
    theirs, ours = pair("HeunDiscreteScheduler", **config, **spread)
    options = {"begin": None if whole is None else 2 * whole, "generator": False}
    loops = [run(scheduler, steps, **options) for scheduler in (theirs, ours)]
    assert rows_of(ours) == 1
    best = exact(pair("HeunDiscreteScheduler", **config, **spread)[0], steps, **options)
    assert_same(loops[1], loops[0], best)
    assert ours.step_index == theirs.step_index


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_heun_is_looked_at_between_its_two_rows(prediction: str) -> None:
    results = []
    for scheduler in pair("HeunDiscreteScheduler", prediction_type=prediction):
        scheduler.set_timesteps(8)
        x, seen = start(scheduler), []
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(asked(scheduler, x, t), t, x).prev_sample
            if i in (2, 6):
                seen += [scheduler.prev_derivative.clone(), scheduler.sample.clone()]
        results.append([x, *seen])
    for found, expected in zip(results[1], results[0], strict=True):
        assert difference(found, expected) < 10 * NEAR  # d is solved for


@example
@given(
    config=st.fixed_dictionaries(
        {
            "beta_schedule": st.sampled_from(["linear", "scaled_linear"]),
            "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
            "steps_offset": st.sampled_from([0, 1]),
            "set_alpha_to_one": st.booleans(),
        }
    ),
    steps=st.integers(1, 60),
)
def test_plms(config: dict[str, Any], steps: int) -> None:
    theirs, ours = pair("PNDMScheduler", **config)
    loops = [run(scheduler, steps, generator=False) for scheduler in (theirs, ours)]
    best = exact(pair("PNDMScheduler", **config)[0], steps, generator=False)
    assert rows_of(ours) == 1
    assert_same(loops[1], loops[0], best)
    assert ours.counter == theirs.counter
    assert len(ours.ets) == min(len(theirs.ets), 3)
    for found, expected in zip(ours.ets, theirs.ets[-3:], strict=True):
        assert difference(found, expected) < 1e-4  # of networks asked at x that differ a little


@pytest.mark.parametrize("config", [{}, {"timestep_spacing": "trailing"}])
@pytest.mark.parametrize("steps", [7, 10])
@pytest.mark.parametrize("begin", [0, 1, 4])
def test_plms_from_a_later_timestep(config: dict[str, Any], steps: int, begin: int) -> None:
    """As image-to-image begins, and with ``ets`` looked at on the way."""
    results = []
    for scheduler in pair("PNDMScheduler", **config):
        scheduler.set_timesteps(steps)
        x = start(scheduler)
        for i, t in enumerate(scheduler.timesteps[begin:]):
            x = scheduler.step(asked(scheduler, x, t), t, x).prev_sample
            if i in (0, 1, 3):
                assert len(scheduler.ets) > 0
                x = x * 0.98
        results.append(x)
    assert difference(results[1], results[0]) < NEAR
