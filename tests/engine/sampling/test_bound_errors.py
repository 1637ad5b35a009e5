"""What no bound can be taken of is refused before the model runs, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import stepfuse as sf

SCHEDULE = sf.Schedule.linear(40)
IMAGES = torch.full((2, 3, 4, 5), -1.0)
STILL = sf.Schedule.from_betas([0.1, 0.0, 0.2])


def never(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """A model that must not be called."""
    raise AssertionError("the model ran")


def middle(value: float) -> Tensor:
    x0 = IMAGES.clone()
    x0[1, 2, 3, 4] = value
    return x0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x0": middle(0.3)}, "8-bit images, .* got 0.3, which is u = 165.75"),
    ({"x0": middle(1 + 1 / 127.5)}, "8-bit images, .* which is u = 256"),
    ({"x0": middle(-1 - 1 / 127.5)}, "8-bit images"),
    ({"x0": middle(float("nan"))}, "8-bit images, .* got nan"),
    ({"x0": middle(float("inf"))}, "8-bit images"),
    ({"x0": IMAGES.bfloat16()}, "x0 must be one of uint8, float32, float64; got torch.bfloat16"),
    ({"x0": IMAGES.long()}, "x0 must be one of uint8"),
    ({"x0": torch.zeros(3, dtype=torch.uint8)}, r"x0 must have shape \[N, C, ...\]"),
    ({"x0": IMAGES[:0]}, r"x0 must have shape \[N, C, ...\]"),
    ({"timesteps": []}, "timesteps must name at least one"),
    ({"timesteps": [3]}, "timesteps must be at least two"),
    ({"timesteps": [40, 0]}, r"timesteps must be in 0 .. 39"),
    ({"timesteps": [5, -1]}, r"timesteps must be in 0 .. 39"),
    ({"timesteps": [0, 5]}, "timesteps must descend"),
    ({"schedule": SCHEDULE.zero_terminal_snr()}, "abar is 0 at timestep 39: prediction_type"),
    ({"schedule": STILL}, "adds no noise at timestep 1"),
    ({"condition": {"labels": [1, 2, 3]}}, r"one entry per sample \(2\)"),
    ({"noise": torch.zeros(40, 2, 3, 4, 4)}, "noise must have shape"),
    ({"cdf": "erf"}, "cdf must be one of exact, tanh; got 'erf'"),
    ({"variance_type": "large"}, "variance_type must be"),
    ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ({"clip_sample": 0.0}, "clip_sample must be positive"),
    ({"graph": "always"}, "graph must be"),
    ({"optimize": True}, "a model for optimize must be"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_refused_before_the_model_runs(arguments: dict[str, Any], message: str) -> None:
    given = {"model": never, "schedule": SCHEDULE, "x0": IMAGES, **arguments}
    kept = given["x0"].clone()
    with pytest.raises((ValueError, TypeError), match=message):
        sf.bits_per_dim(**given)
    torch.testing.assert_close(given["x0"], kept, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*bits/dim over")
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_no_signal_is_fine_where_the_output_says_x0(prediction_type: Any) -> None:
    schedule = SCHEDULE.zero_terminal_snr()
    bound = sf.bits_per_dim(lambda x, t: -x, schedule, IMAGES, prediction_type=prediction_type)
    assert bound.prior.tolist() == [0, 0]
    assert bool(torch.isfinite(bound.terms).all())


@pytest.mark.filterwarnings("ignore:.*bits/dim over")
@pytest.mark.parametrize("channels", [1, 6, 9])
def test_a_model_of_other_channels(channels: int) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return x[:, :1].expand(-1, channels, -1, -1)

    if channels == 6:  # the half that is a variance is left out
        assert bool(torch.isfinite(sf.bits_per_dim(model, SCHEDULE, IMAGES).terms).all())
        return
    with pytest.raises(ValueError, match=rf"model must give .* got shape \(32, {channels}, 4, 5\)"):
        sf.bits_per_dim(model, SCHEDULE, IMAGES)


def test_a_learned_variance_needs_its_channels() -> None:
    with pytest.raises(ValueError, match="with a learned variance; got shape"):
        sf.bits_per_dim(lambda x, t: x, SCHEDULE, IMAGES, variance_type="learned_range")


def test_labels_that_the_network_has_not() -> None:
    checkpoint = sf.load("digits")
    x0 = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels"):
        sf.bits_per_dim(checkpoint.model, checkpoint.schedule, x0, condition={"labels": [11]})


def test_far_too_many_bits_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="variance_type='fixed_large' will give a tighter bound"):
        sf.bits_per_dim(
            lambda x, t: x,
            sf.Schedule.linear(),
            IMAGES,
            timesteps=[900, 500, 0],
            variance_type="fixed_small",
        )
