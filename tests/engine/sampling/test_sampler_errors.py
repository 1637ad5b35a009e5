"""What a sampler refuses, and whether it says which argument, what it got and what it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor

from stepfuse import Sampler, Schedule

SHAPE = (2, 3, 4, 4)
ZEROS = torch.zeros(SHAPE)
MASK = torch.zeros(1, 1, 4, 4)


def build(**settings: Any) -> Sampler:
    return Sampler(Bumpy(), Schedule.linear(), **{"steps": 3, "graph": None, **settings})


def with_nan() -> Tensor:
    x = ZEROS.clone()
    x[0, 0, 0, 0] = math.nan
    return x


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, r"steps must be in 1 \.\. 1000.*got 0"),
        ({"steps": 1001}, ValueError, r"steps must be in 1 \.\. 1000.*got 1001"),
        ({"steps": 2.5}, TypeError, "steps must be an int.*got float 2.5"),
        ({"steps": "ddim300"}, ValueError, "no whole stride .* 'ddim300'"),
        ({"spacing": "even"}, ValueError, "leading, trailing, linspace, quadratic; got 'even'"),
        ({"timesteps": [5, 5]}, ValueError, r"without repetition; got \[5, 5\]"),
        ({"timesteps": [1, 5]}, ValueError, r"must descend.*\[1, 5\]"),
        ({"timesteps": []}, ValueError, "at least one"),
        ({"timesteps": [1000]}, ValueError, r"0 \.\. 999"),
        ({"method": "rk4"}, ValueError, "ddgan, ddim, ddim_hat, ddpm, dpmpp, .*; got 'rk4'"),
        ({"eta": 2.0}, ValueError, r"eta must be in \[0, 1\]; got 2.0"),
        ({"prediction_type": "eps"}, ValueError, "prediction_type .* got 'eps'"),
        ({"variance_type": "big"}, ValueError, "variance_type .* got 'big'"),
        ({"clip_sample": -1.0}, ValueError, "clip_sample .* got -1.0"),
        ({"backend": "cuda"}, ValueError, "backend.*'?cuda'?"),
        ({"graph": "always"}, ValueError, "'auto', 'step', 'loop' or None; got 'always'"),
        ({"dtype": torch.int32}, TypeError, "floating-point type; got torch.int32"),
        ({"max_programs": 0}, ValueError, "max_programs must be at least 1; got 0"),
    ],
)
def test_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**settings)


@pytest.mark.parametrize("model", [None, "unet", 3])
def test_models_that_cannot_be_called(model: Any) -> None:
    with pytest.raises(TypeError, match="callable as model"):
        Sampler(model, Schedule.linear())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": (0, 3, 4, 4)}, ValueError, r"at least 1; got \(0, 3, 4, 4\)"),
        ({"shape": (2,)}, ValueError, r"shape must be \(N, C, \.\.\.\)"),
        ({"shape": (2, 3, -4)}, ValueError, r"got \(2, 3, -4\)"),
        ({"shape": (2, 3.5, 4)}, TypeError, r"whole numbers; got \(2, 3.5, 4\)"),
        ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor; got float"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed .*\(2\); got \(3,\)"),
        ({"seed": torch.zeros(2)}, TypeError, "seed .* got torch.float32"),
        ({"first_index": 1.5}, TypeError, "first_index must be an int"),
        ({"first_index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(2,\); got \(3,\)"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"x_T": ZEROS[:1]}, ValueError, r"x_T must have shape \(2, 3, 4, 4\); got \(1, 3"),
        ({"x_T": with_nan()}, ValueError, "x_T must be finite"),
        ({"x_T": ZEROS / 0}, ValueError, "x_T must be finite"),
        ({"x_T": ZEROS.numpy()}, TypeError, "x_T must be a tensor; got ndarray"),
        ({"noise": ZEROS}, ValueError, r"noise must have shape \(3, 2, 3, 4, 4\)"),
        ({"noise": with_nan().expand(3, *SHAPE)}, ValueError, "noise must be finite"),
        ({"start": 500}, ValueError, "give x_T too"),
        ({"start": -1, "x_T": ZEROS}, ValueError, "start must be at least 0; got -1"),
        ({"start": 500, "x_T": ZEROS, "strength": 0.5}, ValueError, "start or strength"),
        ({"strength": 0.5}, ValueError, "strength=0.5 needs an image"),
        ({"strength": 0.0, "image": ZEROS}, ValueError, r"\(0, 1\]; got 0.0"),
        ({"strength": 1.5, "image": ZEROS}, ValueError, r"\(0, 1\]; got 1.5"),
        ({"strength": math.nan, "image": ZEROS}, ValueError, r"\(0, 1\]; got nan"),
        ({"image": with_nan()}, ValueError, "image must be finite"),
        ({"image": ZEROS[:, :1]}, ValueError, "image must have shape"),
        ({"image": ZEROS, "x_T": ZEROS}, ValueError, "image or x_T"),
        ({"mask": MASK}, ValueError, "mask needs the image"),
        ({"mask": MASK[..., :3], "image": ZEROS}, ValueError, r"broadcastable to \(2, 3, 4, 4\)"),
        ({"mask": MASK + 0.5, "image": ZEROS}, ValueError, "0 .keep. and 1 .generate. only"),
        ({"mask": MASK / 0, "image": ZEROS}, ValueError, "0 .keep. and 1 .generate. only"),
        ({"condition": {"y": torch.zeros(3)}}, ValueError, r"'y' .*\(2\); got shape \(3,\)"),
        ({"condition": {"y": torch.tensor(3)}}, ValueError, "one entry per sample"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    sampler = build()
    with pytest.raises(error, match=message):
        sampler.sample(**{"shape": SHAPE, **arguments})
    sampler.sample(SHAPE)
    if "batch_size" not in arguments:
        with pytest.raises(error, match=message):
            sampler.iterate(**{"shape": SHAPE, **arguments})  # before the first step is asked for


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x, t: None, TypeError, "must return a tensor.*got NoneType"),
        (lambda x, t: ["x"], TypeError, "got list"),
        (lambda x, t: x[:, :1], ValueError, r"\(2, 6, 4, 4\); got \(2, 1, 4, 4\)"),
        (lambda x, t: x[:1], ValueError, r"\(2, 3, 4, 4\); got \(1, 3, 4, 4\)"),
        (lambda x, t: x.long(), TypeError, "model_output .*got torch.int64"),
    ],
)
def test_model_outputs(model: Any, error: type[Exception], message: str) -> None:
    sampler = Sampler(model, Schedule.linear(), steps=2)
    with pytest.raises(error, match=message):
        sampler.sample(SHAPE)


def test_a_learned_variance_needs_twice_the_channels() -> None:
    sampler = build(method="ddpm", variance_type="learned")
    with pytest.raises(ValueError, match="needs 6 output channels; got 3"):
        sampler.sample(SHAPE)


def test_an_epsilon_model_cannot_start_without_signal() -> None:
    schedule = Schedule.linear().zero_terminal_snr()
    with pytest.raises(ValueError, match=r"abar is 0 at timestep 999.*got 'epsilon'"):
        Sampler(Bumpy(), schedule, steps=3, spacing="trailing")
