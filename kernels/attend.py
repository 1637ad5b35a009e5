"""Attention as an operator of the C++ module.

    out = softmax(scale q k^T) v        q [N, heads, L, d], k [N, heads, S, d], v [N, heads, S, d']

Keys and values are packed first; then a dozen queries at a time meet all keys, their logits stay in
the cache, and the weights go straight into the product with v. Logits are float32 and nothing is
subtracted twice: in bfloat16 only the weights e^(s - max s) are rounded, relative 2^-9. Widths are
free, apart from an even d in bfloat16; the result is [N, L, heads, d'] in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels.convolve import native, why_not
from stepfuse.kernels.layout import resolved
from stepfuse.kernels.registration import define, eager

if native is not None:
    from stepfuse.kernels.cpp.module import DTYPES, threads


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise ValueError(f"q, k, v must be of one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if reason := why_not(q.dtype):
        raise ValueError(f"attention in {q.dtype} cannot run here: {reason}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q [N, heads, L, d], k [N, heads, S, d] and v [N, heads, S, d'] do not fit; "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    if q.dtype is torch.bfloat16 and q.shape[3] % 2:
        raise ValueError(f"bfloat16 needs an even width; got {q.shape[3]}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in resolved(q, k, v))
    n, heads, queries, width = q.shape
    keys, values = k.shape[2], v.shape[3]
    if out is None or out.shape != (n, heads, queries, values) or out.dtype != q.dtype:
        out = q.new_empty((n, queries, heads, values)).transpose(1, 2)
    native.attend(
        *([x.data_ptr(), *x.stride()[:3]] for x in (q, k, v, out)),
        DTYPES[q.dtype],
        [n, heads, queries, keys, width, values],
        scale,
        threads(),
    )
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    n, heads, queries, _ = q.shape
    return q.new_empty((n, queries, heads, v.shape[3])).transpose(1, 2)


def _new(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _run(q, k, v, scale)


attend = define("attend(Tensor q, Tensor k, Tensor v, float scale) -> Tensor", _new, _fake)


def attend_eagerly(
    q: Tensor, k: Tensor, v: Tensor, scale: Any, out: Tensor | None = None
) -> Tensor:
    """`attend`, which skips the dispatcher where nobody watches it.

    ``out`` may hold the result: a tensor like it that shares no memory with the arguments.
    """
    if eager(q, k, v):
        return _run(q, k, v, scale, out)
    y: Tensor = attend(q, k, v, scale)
    return y
