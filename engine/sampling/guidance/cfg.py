"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stepfuse.engine.sampling.denoiser import Condition
from stepfuse.engine.sampling.evaluation import Evaluation
from stepfuse.engine.sampling.guidance.protocol import Outputs
from stepfuse.kernels.arguments import check_flag_or_word
from stepfuse.kernels.checks import as_number, received
from stepfuse.kernels.step_row import Column

_ROUNDINGS = 4  # what a mixture and its mean are rounded to, at most, in units of the last place


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
        batched: True evaluates both halves in one call of twice the batch, which needs tensors on
            both sides and more memory; False in two calls. "auto" is one call on CUDA, where a
            launch costs much and a larger batch little, if the two conditions and the model allow
            it, and two calls on the CPU.

    Raises TypeError or ValueError for numbers that are not finite or out of range.
    """

    scale: float
    unconditional: Mapping[str, Any] = field(default_factory=dict)
    rescale: float = 0.0
    interval: tuple[int, int] | None = None
    batched: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", as_number("scale", self.scale))
        object.__setattr__(self, "rescale", as_number("rescale", self.rescale, finite=False))
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1]; got {self.rescale}")
        if not isinstance(self.unconditional, Mapping):
            raise TypeError(
                'unconditional must be a mapping, {"labels": None} say; got '
                f"{received(self.unconditional)}"
            )
        check_flag_or_word("batched", self.batched, "auto")
        if self.interval is None:
            return
        if not isinstance(self.interval, Sequence) or len(self.interval) != 2:
            raise TypeError(f"interval must be (low, high) or None; got {received(self.interval)}")
        low, high = (as_number("interval", end) for end in self.interval)
        if low > high:
            raise ValueError(f"interval must be (low, high); got {self.interval}")

    @property
    def evaluations(self) -> int:
        """Of the model in a guided step."""
        return 2

    @property
    def mixture(self) -> bool:
        """Whether the step's row says all that happens to the two outputs."""
        return not self.rescale

    def outputs(self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Condition) -> Outputs:
        """Both outputs, which the update mixes, or the rescaled mixture."""
        one_call = x.is_cuda and denoiser.takes_both if self.batched == "auto" else self.batched
        if one_call:
            halves = denoiser(torch.cat([x, x]), torch.cat([t, t]), denoiser.both)
            uncond, cond = halves.chunk(2)
        else:
            cond = denoiser(x, t, condition)
            uncond = denoiser(x, t, denoiser.unconditional)
        if not self.rescale:
            return Outputs(cond, uncond)
        channels = x.shape[1]
        scale = denoiser.row[Column.GUIDANCE].to(cond.dtype)
        mixed = self.combine(cond[:, :channels], uncond[:, :channels], scale)
        return Outputs(torch.cat([mixed, cond[:, channels:]], dim=1))

    def scale_at(self, t: int) -> float:
        """The scale in force at timestep t."""
        inside = self.interval is None or self.interval[0] <= t <= self.interval[1]
        return self.scale if inside else 1.0

    def is_active(self, t: int) -> bool:
        """Whether a second evaluation is needed at timestep t."""
        return self.scale_at(t) != 1

    def combine(self, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        """The rescaled mixture, [N, C, ...]; a learned variance stays that of ``cond``.

        Computed in float32 at least. A mixture that has no standard deviation to rescale is left
        as it is: a constant one, a single number, or one of which rounding is all that remains.
        """
        dtype, precise = cond.dtype, torch.promote_types(cond.dtype, torch.float32)
        cond, uncond, scale = cond.to(precise), uncond.to(precise), scale.to(precise)
        change = scale * (cond - uncond)
        mixed = uncond + change
        if cond[0].numel() == 1:
            return mixed.to(dtype)
        dims = tuple(range(1, cond.dim()))
        spread = mixed.std(dim=dims, keepdim=True)
        rounding = torch.finfo(precise).eps * (uncond.abs() + change.abs()).amax(dims, keepdim=True)
        ratio = cond.std(dim=dims, keepdim=True) / spread
        ratio = torch.where(spread > _ROUNDINGS * rounding, ratio, torch.ones_like(ratio))
        return (mixed * (1 + self.rescale * (ratio - 1))).to(dtype)
