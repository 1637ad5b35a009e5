"""Diffusions with guided-diffusion's interface, small networks, and seeded comparisons."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.adapters import guided_diffusion_oracle as oracle
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.adapters import guided_diffusion

SHAPE = (3, 2, 4, 5)
STEPS = 12
# float32 coefficients on both sides: 1e-7 times 1 / sqrt(abar) = 24 at the end, over 12 steps
NEAR = 5e-5
CHECKOUT = os.environ.get("GUIDED_DIFFUSION", "")


class Network(nn.Module):
    """Elementwise: nonlinear in x, different for every t and label; a variance half if asked."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.learned = learned
        self.heard: list[float] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert t.shape == x.shape[:1]
        self.heard.append(float(t[0]))
        shift = (t % 7).to(x.dtype) / 7 + (0 if y is None else y)
        wave = torch.sin(2 * x + shift.view(-1, 1, 1, 1))
        out = self.weight * wave + 0.3 * x
        return torch.cat([out, wave.flip(1)], dim=1) if self.learned else out


def gradient(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """A classifier's gradient, taken as the library's script takes it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        shift = t.to(x.dtype).view(-1, 1, 1, 1) / 500 + (0 if y is None else y.view(-1, 1, 1, 1))
        return torch.autograd.grad(torch.sin(x + shift).sum(), x)[0]


def betas(total: int) -> np.ndarray:
    return np.linspace(0.1 / total, 20 / total, total)


def diffusion(
    library: str = "oracle",
    mean: str = "EPSILON",
    var: str = "FIXED_SMALL",
    spaced: list[int] | None = None,
    rescale: bool = False,
    total: int = 60,
) -> Any:
    """A diffusion of 60 timesteps, 12 of them kept unless ``spaced`` says which."""
    keep = list(range(0, total, total // STEPS)) if spaced is None else spaced
    if library == "oracle":
        types = {"model_mean_type": oracle.MeanType[mean], "model_var_type": oracle.VarType[var]}
        return oracle.Spaced(keep, betas(total), rescale_timesteps=rescale, **types)
    if not CHECKOUT:
        pytest.skip("the environment variable GUIDED_DIFFUSION names no checkout of it")
    if CHECKOUT not in sys.path:
        sys.path.append(CHECKOUT)
    theirs = importlib.import_module("guided_diffusion.gaussian_diffusion")
    respace = importlib.import_module("guided_diffusion.respace")
    return respace.SpacedDiffusion(
        use_timesteps=keep,
        betas=betas(total),
        model_mean_type=theirs.ModelMeanType[mean],
        model_var_type=theirs.ModelVarType[var],
        loss_type=theirs.LossType.MSE,
        rescale_timesteps=rescale,
    )


def compare(d: Any, run: Callable[[Any], Any], near: float = NEAR, **options: Any) -> Any:
    """Seeded results before and after, and the generator's state: equal. Returns ours."""

    def seeded() -> tuple[Any, Tensor]:
        torch.manual_seed(5)
        return run(d), torch.get_rng_state()

    theirs, state = seeded()
    assert sf.accelerate(d, **{"optimize": False, **options}) is d
    assert "not replaced" not in guided_diffusion.explain(d)
    ours, after = seeded()
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
    assert torch.equal(state, after)
    return ours
