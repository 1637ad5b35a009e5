"""Where diffusers' solvers err: kept by default, done right with ``strict=False``; and mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.utils import logging
from tests.engine.adapters.schedulers_case import ODD, seeded
from tests.engine.adapters.solvers_case import (
    MEMORIES,
    NAMES,
    difference,
    draws,
    network,
    pair,
    rows_of,
    run,
)

from stepfuse.engine.adapters import diffusers as ours_of

EULER = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"]


def test_the_third_order_is_one() -> None:
    """On Gaussian data, whose flow keeps (x - a mean) / spread, down to a sigma that is not 0."""
    mean, std, errors = 0.3, 0.5, []
    for strict in (False, True):
        config = {"solver_order": 3, "prediction_type": "sample", "lower_order_final": False}
        config["final_sigmas_type"] = "sigma_min"
        ours = pair("DPMSolverMultistepScheduler", strict=strict, **config)[1]
        ours.set_timesteps(80)
        ours.sigmas = torch.linspace(3, -4, 81).exp()
        signal = (1 + ours.sigmas.square()).rsqrt()
        spread = (signal.square() * std**2 + (ours.sigmas * signal).square()).sqrt()
        x = start = torch.randn(ODD, generator=seeded(1)) * spread[0] + mean * signal[0]
        for i, t in enumerate(ours.timesteps):
            a, s = signal[i], ours.sigmas[i] * signal[i]
            output = (a * std**2 * x + s**2 * mean) / spread[i] ** 2
            x = ours.step(output, t, x).prev_sample
        best = (start - mean * signal[0]) / spread[0] * spread[-1] + mean * signal[-1]
        errors.append(difference(x, best))
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("config", [{"solver_type": "bh1"}, {"lower_order_final": False}])
def test_unipc_ends_in_a_number(config: dict[str, Any]) -> None:
    theirs, ours = pair("UniPCMultistepScheduler", **config)
    x, found = (run(scheduler, 8, generator=False).x for scheduler in (theirs, ours))
    assert torch.equal(found, x) or not x.isfinite().all()
    assert torch.equal(found.isfinite(), x.isfinite())
    _, right = pair("UniPCMultistepScheduler", strict=False, **config)
    assert run(right, 8, generator=False).x.isfinite().all()
    assert rows_of(right) == 1


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        ),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("LCMScheduler", {"thresholding": True}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("UniPCMultistepScheduler", {"thresholding": True}),
        ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    ],
)
def test_what_no_row_does_is_done_by_the_original(name: str, config: dict[str, Any]) -> None:
    theirs, ours = pair(name, **config)
    options = {"generator": draws(name)}
    assert ours.refusal(ours.config)
    assert torch.equal(run(ours, 7, **options).x, run(theirs, 7, **options).x)
    assert rows_of(ours) == 0


def test_churn_is_done_by_the_original() -> None:
    theirs, ours = pair("EulerDiscreteScheduler")
    x, found = (run(scheduler, 7, s_churn=2.0) for scheduler in (theirs, ours))
    assert torch.equal(found.x, x.x)
    assert torch.equal(found.state, x.state)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_done_by_the_original(name: str) -> None:
    options = {"generator": draws(name), "dtype": torch.float64}
    theirs, ours = pair(name)
    assert torch.equal(run(ours, 7, **options).x, run(theirs, 7, **options).x)


@pytest.mark.parametrize("name", EULER)
def test_an_integer_is_no_timestep(name: str) -> None:
    ours = pair(name)[1]
    ours.set_timesteps(5)
    x = ours.scale_model_input(torch.randn(ODD), ours.timesteps[0])
    with pytest.raises(ValueError, match="integer"):
        ours.step(network(x), 3, x)


@pytest.mark.parametrize("name", EULER)
def test_a_sample_that_was_not_scaled_is_warned_of(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = pair(name)[1]
    ours.set_timesteps(5)
    said: list[str] = []
    module = type(ours).__bases__[1].__module__
    monkeypatch.setattr(logging.get_logger(module), "warning", said.append)
    ours.step(torch.zeros(ODD), ours.timesteps[0], torch.randn(ODD))
    assert any("scale_model_input" in line for line in said)


@pytest.mark.parametrize("name", [*MEMORIES, "LCMScheduler", "TCDScheduler"])
def test_no_step_without_timesteps(name: str) -> None:
    with pytest.raises(ValueError, match="set_timesteps"):
        pair(name)[1].step(torch.zeros(ODD), 3, torch.zeros(ODD))


@pytest.mark.parametrize("name", NAMES)
def test_configurations_go_both_ways(name: str, tmp_path: Any) -> None:
    option = {"shift": 3.0} if name.startswith("Flow") else {"beta_schedule": "linear"}
    theirs, ours = pair(name, **option)
    assert dict(ours.config) == dict(theirs.config)
    ours.save_pretrained(tmp_path)
    for kind in (type(theirs), type(ours)):
        assert option.items() <= dict(kind.from_pretrained(tmp_path).config).items()
    assert ours.__module__ == type(theirs).__module__
    other = ours_of.DDIMScheduler.from_config(ours.config)
    assert type(ours).from_config(other.config, strict=False).strict is False
