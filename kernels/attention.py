"""Attention without a mask, on keys and values that are packed for the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels.backends import implementation
from stepfuse.kernels.layout import resolved
from stepfuse.kernels.products import why_not
from stepfuse.kernels.registration import define, eager


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, out: Tensor | None = None
) -> Tensor:
    """Weigh values by the softmax of products.

        y = softmax(scale q k^T) v          Vaswani et al. 2017, eq. 1

    Args:
        q: [N, heads, L, d], in any order of dimensions.
        k: [N, heads, S, d]; v: [N, heads, S, d'], of the dtype of q. Every size is free.
        scale: positive; d^-0.5 as a rule.
        out: may hold y: a tensor like it that shares no memory with the arguments.

    Returns y [N, heads, L, d'], which lies [N, L, heads, d'] in memory. Logits and sums are float32
    (float64 for float64 input). CPU tensors only; records no gradient.

    The C++ module runs float32, and bfloat16 of an even d where `products.why_not` knows no reason
    against it; the reference all else.

    Raises ValueError for arguments that do not fit together.
    """
    if q.is_cpu and eager(q, k, v):
        return _run(q, k, v, scale, out)
    y: Tensor = OP(q, k, v, scale)
    return y


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise ValueError(f"q, k, v must be of one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not _fit(q.shape, k.shape, v.shape):
        raise ValueError(
            "q [N, heads, L, d], k [N, heads, S, d] and v [N, heads, S, d'] do not fit; "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    n, heads, queries, width = q.shape
    shape = (n, heads, queries, v.shape[3])
    if out is None or out.shape != shape or out.dtype != q.dtype:
        out = _empty(q, shape)
    odd = q.dtype is torch.bfloat16 and width % 2
    backend = "reference" if odd or why_not(q.dtype) else "cpp"
    implementation("attention", backend).run(*resolved(q, k, v), scale, out)
    return out


def _fit(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> bool:
    if not len(q) == len(k) == len(v) == 4:
        return False
    n, heads, _, width = q
    keys = k[2]
    return k == (n, heads, keys, width) and v == (n, heads, keys, v[3])


def _new(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _run(q, k, v, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _empty(q, (*q.shape[:3], v.shape[3]))


def _empty(like: Tensor, shape: Sequence[int], **options: Any) -> Tensor:
    """A result: the heads of a position lie side by side, as the layer after it reads them."""
    n, heads, queries, values = shape
    return like.new_empty((n, queries, heads, values), **options).transpose(1, 2)


OP = define(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    _new,
    _fake,
    devices=("CPU",),
    direct=lambda: attention,
    blank=lambda result: _empty(result, result.shape, device="meta"),
)
