"""Steering the sample: classifier-free guidance and classifier guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6 with scale = w + 1).

        o = o_uncond + scale (o_cond - o_uncond)

    Args:
        scale: 1 is no guidance and costs one evaluation; anything else costs two.
        unconditional: what replaces entries of the condition, {"labels": None} say. Dicts inside
            are replaced key by key, lists and tuples of one length entry by entry; a number or a
            tensor in the place of a tensor is spread to its shape, [1, ...] over the batch say.
        rescale: phi in [0, 1] of Lin et al. 2024, section 3.4: pulls the standard deviation of o
            back to that of o_cond, per sample.
        interval: (low, high): guide only at timesteps low <= t <= high (Kynkaanniemi et al. 2024);
            elsewhere one evaluation does.
        batched: evaluate both halves in one call of twice the batch; needs tensors on both sides.
            Two calls otherwise.
    """

    scale: float
    unconditional: Mapping[str, Any] = field(default_factory=dict)
    rescale: float = 0.0
    interval: tuple[int, int] | None = None
    batched: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1]; got {self.rescale}")
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ValueError(f"interval must be (low, high); got {self.interval}")

    def scale_at(self, t: int) -> float:
        """The scale in force at timestep t."""
        inside = self.interval is None or self.interval[0] <= t <= self.interval[1]
        return self.scale if inside else 1.0

    def is_active(self, t: int) -> bool:
        """Whether a second evaluation is needed at timestep t."""
        return self.scale_at(t) != 1

    def combine(self, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        """The rescaled mixture, [N, C, ...]; a learned variance stays that of ``cond``."""
        mixed = uncond + scale * (cond - uncond)
        dims = tuple(range(1, cond.dim()))
        ratio = cond.std(dim=dims, keepdim=True) / mixed.std(dim=dims, keepdim=True)
        return mixed * (1 + self.rescale * (ratio - 1))


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by the gradient of a classifier (Dhariwal & Nichol 2021, section 4).

        DDPM    mean + scale Sigma grad log p(y | x_t)                    algorithm 1
        DDIM    eps - scale sqrt(1 - abar_t) grad log p(y | x_t)          algorithm 2

    Args:
        fn: called as fn(x, t, **condition) with x [N, C, ...] and t int64 [N].
        scale: strength; 0 switches it off.
        returns: "log_probability" (log p(y | x_t), [N], differentiated here) or "gradient".
    """

    fn: Callable[..., Tensor]
    scale: float = 1.0
    returns: Literal["log_probability", "gradient"] = "log_probability"

    def __post_init__(self) -> None:
        if self.returns not in ("log_probability", "gradient"):
            raise ValueError(
                f"returns must be 'log_probability' or 'gradient'; got {self.returns!r}"
            )

    def scale_at(self, t: int) -> float:
        """The scale in force at timestep t."""
        return self.scale

    def is_active(self, t: int) -> bool:
        """Whether the classifier is evaluated at timestep t."""
        return self.scale != 0

    def gradient(self, x: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """grad log p(y | x_t) with respect to x, [N, C, ...]."""
        if self.returns == "gradient":
            return self.fn(x, t, **condition)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            log_probability = self.fn(leaf, t, **condition)
            (gradient,) = torch.autograd.grad(log_probability.sum(), leaf)
        return gradient


Guidance = CFG | ClassifierGuidance
