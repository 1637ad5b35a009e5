"""softmax(scale q k^T) v, as written (Vaswani et al. 2017, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The attention of every sample and head in float32, or float64 for float64 input.

    q: [N, heads, L, d]; k: [N, heads, S, d]; v: [N, heads, S, d']; returns [N, heads, L, d'].
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = scale * (q.to(dtype) @ k.to(dtype).mT)
    return torch.softmax(logits, dim=-1) @ v.to(dtype)


def run(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """Write the result into ``out`` [N, heads, L, d']."""
    out.copy_(formula(q, k, v, scale))
