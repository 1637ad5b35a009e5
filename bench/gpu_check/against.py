"""Comparing results with a float64 reference: memory with poison around it, and what may differ."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "channels_last"]

# One rounding of the result, relative: half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_HALF = 2.0**-25  # half the smallest float16: what rounding a subnormal costs at most
_EDGE = 64  # elements before and behind a result


class Poisoned:
    """A result buffer laid out like ``like``, full of NaN, with NaN before and behind it."""

    def __init__(self, like: Tensor) -> None:
        size = like.numel()
        self._memory = torch.full(
            (size + 2 * _EDGE,), torch.nan, dtype=like.dtype, device=like.device
        )
        self.tensor = self._memory[_EDGE : _EDGE + size].as_strided(
            like.shape, like.stride(), _EDGE
        )

    def problems(self, what: str) -> list[str]:
        """Elements that were not written, and memory around that was."""
        found = []
        missed = int(self.tensor.isnan().sum())
        if missed:
            found.append(f"{what}: {missed} of {self.tensor.numel()} elements were not written")
        edges = self._memory[:_EDGE], self._memory[-_EDGE:]
        if not all(bool(edge.isnan().all()) for edge in edges):
            found.append(f"{what}: memory around it was written")
        return found


def placed(x: Tensor, layout: Layout) -> Tensor:
    """A copy of x [N, C, ...], dense in C order or with the channels innermost."""
    if layout == "channels_last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def off(what: str, found: Tensor, exact: Tensor, allowed: Tensor | float) -> list[str]:
    """A line where ``found`` is further from ``exact`` (CPU, float64) than ``allowed``.

    The rounding of its own dtype comes on top of that.
    """
    actual = found.detach().cpu()
    rounding = ROUNDING.get(actual.dtype, 0.0) * exact.abs()
    if actual.dtype == torch.float16:
        rounding = rounding + SMALLEST_HALF
    difference = (actual.double() - exact).abs()
    excess = difference - rounding - allowed
    bad = ~(excess <= 0)
    if not bool(bad.any()):
        return []
    at = int(excess.nan_to_num(torch.inf).flatten().argmax())
    return [
        f"{what}: {int(bad.sum())} of {exact.numel()} elements are off; at {at} it is "
        f"{float(actual.flatten()[at]):.9g} where {float(exact.flatten()[at]):.9g} is right"
    ]
