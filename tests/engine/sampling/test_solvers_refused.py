"""What `Sampler` refuses of solvers and grids, and networks that want whole timesteps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor, nn

import stepfuse as sf

SHAPE = (3, 2, 5, 3)


def sampler(settings: dict[str, Any]) -> sf.Sampler:
    given = {"steps": 6, **settings}
    return sf.Sampler(given.pop("model", Bumpy()), sf.Schedule.linear(), **given)


class Whole(nn.Module):
    integer_timesteps = True

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        return torch.sin(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dpmpp", "order": 3, "steps": 2}, "order 3 of method 'dpmpp' needs as many"),
        ({"method": "dpmpp", "grid": "karras", "steps": 1}, "grid 'karras' has two ends: steps"),
        ({"method": "dpmpp", "grid": "cosine"}, "grid must be one of karras, exponential"),
        ({"method": "dpmpp", "solver_type": "bh2"}, "solver_type of method 'dpmpp' must be one of"),
        ({"method": "ddim", "grid": "karras"}, "method 'ddim' takes no grid"),
        ({"method": "lcm", "grid": "karras"}, "method 'lcm' takes no grid"),
        ({"method": "ddim", "timesteps": [3.5, 1]}, "timesteps must be whole numbers; got float 3"),
        ({"method": "euler", "grid": "karras", "timesteps": [3, 1]}, "timesteps or grid, not both"),
        (
            {"method": "euler", "grid": "karras", "model": Whole()},
            r"whole for Whole \(integer_time",
        ),
        ({"method": "euler", "prediction_type": "flow_prediction", "grid": "beta"}, "a list of si"),
        ({"method": "euler", "prediction_type": "flow_prediction", "timesteps": [0]}, r"1 \.\. 10"),
        ({"method": "unipc", "prediction_type": "mean"}, "needs prediction_type 'epsilon'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(settings)


def test_a_network_of_whole_timesteps_gets_them() -> None:
    made = sampler({"method": "dpmpp", "model": Whole()})
    assert bool(made.sample(SHAPE).isfinite().all())
    with pytest.raises(ValueError, match="whole for Whole"):
        made.set_timesteps(5, grid="karras")
    assert len(made.timesteps) == 6


def test_steps_take_a_word_and_a_grid_takes_a_number() -> None:
    assert sampler({"method": "dpmpp", "steps": "ddim10"}).timesteps[0] == 900
    with pytest.raises(TypeError, match="steps must be an int for a grid; got str 'ddim10'"):
        sampler({"method": "dpmpp", "steps": "ddim10", "grid": "karras"})
