"""The forward process by the C++ module; the contract is that of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.cpp.module import DTYPES, native, threads


def run(
    x0: Tensor,
    noise: Tensor | None,
    t: Tensor,
    alphas_cumprod: Tensor,
    seed: Tensor | None,
    sample: Tensor | None,
    out: Tensor,
    target: Tensor | None,
    velocity: bool,
) -> None:
    """Write x_t into ``out`` and, where ``target`` is given, eps or v into it.

    Drawn noise is numbered in C order, so other layouts go through a contiguous copy.
    """
    dense = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    dense_target = target
    if target is not None and not target.is_contiguous():
        dense_target = torch.empty(target.shape, dtype=target.dtype)
    x0, t, alphas_cumprod = x0.contiguous(), t.contiguous(), alphas_cumprod.contiguous()
    if noise is not None:
        noise = noise.to(x0.dtype).contiguous()
    elif seed is not None and sample is not None:
        seed, sample = seed.contiguous(), sample.contiguous()
    count = x0.shape[0]
    native.add_noise(
        x0.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        t.data_ptr(),
        alphas_cumprod.data_ptr(),
        alphas_cumprod.shape[0],
        0 if seed is None else seed.data_ptr(),
        0 if sample is None else sample.data_ptr(),
        dense.data_ptr(),
        0 if dense_target is None else dense_target.data_ptr(),
        velocity,
        DTYPES[x0.dtype],
        count,
        x0.numel() // count,
        threads(),
    )
    if dense is not out:
        out.copy_(dense)
    if target is not None and dense_target is not None and dense_target is not target:
        target.copy_(dense_target)
