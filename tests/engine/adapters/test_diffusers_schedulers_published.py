"""The sums that diffusers' own scheduler tests publish, and those tests themselves where given."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.adapters.schedulers_case import OURS
from tests.engine.adapters.solvers_case import pair
from torch import Tensor

SUM_TOLERANCE = 1e-2  # theirs, for the sum over 768 elements


def ramp(backwards: bool = False) -> Tensor:
    """0, 1/768, 2/768, ... in [4, 3, 8, 8], the sample index running fastest."""
    values = torch.arange(768) / 768
    return (values.flip(0) if backwards else values).view(3, 8, 8, 4).movedim(-1, 0)


def total(name: str, steps: int | None, start: int = 0, **config: Any) -> float:
    """Sum of |x| after a loop with the model x t / (t + 1), from the ``start``-th timestep."""
    scheduler = OURS[name](**config)
    if steps is not None:
        scheduler.set_timesteps(steps)
    kwargs = {"generator": torch.manual_seed(0)} if name == "DDPMScheduler" else {}
    timesteps, x = scheduler.timesteps[start:], ramp()
    if start:
        x = scheduler.add_noise(x, ramp(backwards=True), timesteps[:1])
    for t in timesteps:
        x = scheduler.step(x * (t / (t + 1)), t, x, **kwargs).prev_sample
    return float(x.abs().sum())


@pytest.mark.parametrize(
    ("name", "steps", "start", "config", "published"),
    [
        ("DDIMScheduler", 10, 0, {}, 172.0067),
        ("DDIMScheduler", 10, 0, {"prediction_type": "v_prediction"}, 52.5302),
        ("DDIMScheduler", 10, 0, {"beta_start": 0.01}, 149.8295),
        ("DDIMScheduler", 10, 0, {"beta_start": 0.01, "set_alpha_to_one": False}, 149.0784),
        ("DDIMScheduler", 10, 8, {}, 354.5418),
        ("DDPMScheduler", None, 0, {}, 258.9606),
        ("DDPMScheduler", None, 0, {"prediction_type": "v_prediction"}, 202.0296),
        ("DDPMScheduler", None, 998, {}, 387.9466),
        ("DDIMInverseScheduler", 10, 0, {}, 671.6816),
        ("DDIMInverseScheduler", 10, 0, {"prediction_type": "v_prediction"}, 1394.2185),
        ("DDIMInverseScheduler", 10, 0, {"beta_start": 0.01}, 539.9622),
        ("DDIMInverseScheduler", 10, 0, {"beta_start": 0.01, "set_alpha_to_one": False}, 542.6722),
    ],
)
def test_published_sums(
    name: str, steps: int | None, start: int, config: dict[str, Any], published: float
) -> None:
    assert total(name, steps, start, **config) == pytest.approx(published, abs=SUM_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "config", "published"),
    [
        ("EulerDiscreteScheduler", {"num_train_timesteps": 1100}, 10.0807),
        ("EulerAncestralDiscreteScheduler", {"num_train_timesteps": 1100}, 152.3192),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}, 0.2464 * 768),
    ],
)
def test_published_sums_of_solvers(name: str, config: dict[str, Any], published: float) -> None:
    """Those of Euler's step from x as it is scaled for the model, which their tests do; to 0.001 of
    the mean where that is published.
    """
    scheduler = pair(name, **config)[1]
    scheduler.set_timesteps(10)
    kwargs = {"generator": torch.manual_seed(0)} if "Euler" in name else {}
    x = ramp() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(x, t)
        x = scheduler.step(x * (t / (t + 1)), t, x, **kwargs).prev_sample
    near = SUM_TOLERANCE if "Euler" in name else 768e-3
    assert float(x.abs().sum()) == pytest.approx(published, abs=near)


FILES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "ddim_inverse": "DDIMInverseScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm_multi": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
EXCHANGE = """
import sys, diffusers, pytest
from stepfuse.engine.adapters import diffusers as ours
for name in sys.argv.pop(1).split():
    setattr(diffusers, name, getattr(ours, name))
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif(
    "DIFFUSERS_TESTS" not in os.environ,
    reason="DIFFUSERS_TESTS does not name the tests folder of a diffusers checkout",
)
def test_their_own_tests_pass_with_our_classes() -> None:
    folder = Path(os.environ["DIFFUSERS_TESTS"]).resolve()
    files = [str(folder / "schedulers" / f"test_scheduler_{name}.py") for name in FILES]
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(folder.parent)]
    if importlib.util.find_spec("torchsde") is None:
        options += ["-k", "not test_compatibles"]  # it builds every compatible scheduler
    done = subprocess.run(
        [sys.executable, "-c", EXCHANGE, " ".join(FILES.values()), *options, *files],
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
