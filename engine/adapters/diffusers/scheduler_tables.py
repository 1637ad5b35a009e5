"""Betas and timestep lists as diffusers' schedulers define them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST = 0.999  # the largest beta of a schedule that is given as a curve of abar


def betas_of(config: Any, scheduler: type, dtype: torch.dtype = torch.float32) -> Tensor:
    """The betas of a scheduler's configuration, [T], in the arithmetic of ``dtype``.

    Raises NotImplementedError for a ``beta_schedule`` that does not exist.
    """
    steps, name = config.num_train_timesteps, config.beta_schedule
    low, high = config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=dtype)
    elif name == "linear":
        betas = torch.linspace(low, high, steps, dtype=dtype)
    elif name == "scaled_linear":
        betas = torch.linspace(low**0.5, high**0.5, steps, dtype=dtype).square()
    elif name == "squaredcos_cap_v2":
        betas = _from_curve(_cosine, steps, dtype)
    elif name == "laplace" and scheduler.__name__ == "DDPMScheduler":
        betas = _from_curve(_laplace, steps, dtype)
    elif name == "sigmoid" and scheduler.__name__ == "DDPMScheduler":
        ramp = torch.linspace(-6, 6, steps, dtype=dtype)
        betas = torch.sigmoid(ramp) * (high - low) + low
    else:
        raise NotImplementedError(f"{scheduler.__name__} has no beta_schedule {name!r}")
    return zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas


def _cosine(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    side = math.copysign(1.0, 0.5 - u)
    ratio = math.exp(-0.5 * side * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6))
    return math.sqrt(ratio / (1 + ratio))


def _from_curve(abar: Any, steps: int, dtype: torch.dtype) -> Tensor:
    ends = [(i / steps, (i + 1) / steps) for i in range(steps)]
    return torch.tensor([min(1 - abar(v) / abar(u), _MOST) for u, v in ends], dtype=dtype)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """sqrt(abar) shifted and scaled to end at 0 (Lin et al. 2024, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    abar = root.square()
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def spaced(
    spacing: str, accepted: tuple[str, ...], train_steps: int, steps: int, offset: int
) -> Tensor:
    """``steps`` indices of the training schedule, descending, int64.

    "leading" counts up from ``offset`` in strides of T // S, "trailing" down from T - 1 in strides
    of T / S, "linspace" goes from T - 1 to 0. Raises ValueError for another spacing, or for steps
    outside 1 .. T.
    """
    if steps > train_steps:
        raise ValueError(
            f"num_inference_steps must be at most num_train_timesteps ({train_steps}); got {steps}"
        )
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {steps}")
    if spacing not in accepted:
        raise ValueError(f"timestep_spacing must be one of {', '.join(accepted)}; got {spacing!r}")
    if spacing == "linspace":
        indices = np.linspace(0, train_steps - 1, steps).round()[::-1]
    elif spacing == "leading":
        indices = np.arange(steps, dtype=np.float64)[::-1] * (train_steps // steps) + offset
    else:
        # arange leaves one index too many, -1, where the strides' rounding errors add up
        indices = np.round(np.arange(train_steps, 0, -train_steps / steps)) - 1
    return torch.from_numpy(indices.astype(np.int64))
