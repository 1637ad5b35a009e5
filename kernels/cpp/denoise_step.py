"""One sampler update by the C++ module; the contract is that of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.cpp.module import DTYPES, native, threads


def run(
    x: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample: Tensor | None,
    learned_variance: bool,
    out: Tensor,
    x0_out: Tensor | None,
    history: Tensor | None = None,
    history_table: Tensor | None = None,
) -> None:
    """Write x_s into ``out`` and, where given, the clipped x0 into ``x0_out``.

    The model outputs may be of another dtype than x, and halves of one batch. Drawn noise is
    numbered in C order, so other layouts go through a contiguous copy, and so does a history.
    """
    dense = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    dense_x0 = x0_out
    if x0_out is not None and not x0_out.is_contiguous():
        dense_x0 = torch.empty(x0_out.shape, dtype=x0_out.dtype)
    x, model_output = x.contiguous(), model_output.contiguous()
    if table.dtype != torch.float32 or not table.is_contiguous():
        table = table.to(torch.float32).contiguous()
    if uncond_output is not None:
        uncond_output = uncond_output.to(model_output.dtype).contiguous()
    if noise is not None:
        noise = noise.to(x.dtype).contiguous()
    elif seed is not None and sample is not None:
        seed, sample = seed.contiguous(), sample.contiguous()
    dense_history = None if history is None else history.contiguous()
    if history_table is not None:
        history_table = history_table.to(torch.float32).contiguous()
    count = x.shape[0]
    stride = model_output.numel() // count
    native.denoise_step(
        x.data_ptr(),
        model_output.data_ptr(),
        0 if uncond_output is None else uncond_output.data_ptr(),
        table.data_ptr(),
        table.shape[0],
        step.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        0 if seed is None else seed.data_ptr(),
        0 if sample is None else sample.data_ptr(),
        dense.data_ptr(),
        0 if dense_x0 is None else dense_x0.data_ptr(),
        0 if dense_history is None else dense_history.data_ptr(),
        0 if history_table is None else history_table.data_ptr(),
        0 if history is None else len(history),
        DTYPES[x.dtype],
        DTYPES[model_output.dtype],
        learned_variance,
        count,
        x.numel() // count,
        stride,
        stride,
        threads(),
    )
    if history is not None and dense_history is not None and dense_history is not history:
        history.copy_(dense_history)
    if dense is not out:
        out.copy_(dense)
    if x0_out is not None and dense_x0 is not None and dense_x0 is not x0_out:
        x0_out.copy_(dense_x0)
