"""Attention by the C++ module, in float32 and bfloat16; the contract is that of the reference.

Keys and values are packed first; then a dozen queries at a time meet all keys, their logits stay in
the cache, and the weights go straight into the product with v. In bfloat16 only the weights
e^(s - max s) are rounded, relative 2^-9, and d must be even.
"""

from __future__ import annotations

from torch import Tensor

from stepfuse.kernels.cpp.module import DTYPES, native, threads


def run(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """Write the result into ``out`` [N, heads, L, d'], whose widths lie side by side."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    n, heads, queries, width = q.shape
    native.attention(
        *([x.data_ptr(), *x.stride()[:3]] for x in (q, k, v, out)),
        DTYPES[q.dtype],
        [n, heads, queries, k.shape[2], width, v.shape[3]],
        scale,
        threads(),
    )
