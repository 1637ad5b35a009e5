"""One sampler update, read off a row of the step table (see `stepfuse.kernels.step_row`)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.reference import philox
from stepfuse.kernels.step_row import Column


def update(
    x: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    row: Tensor,
    noise: Tensor | None,
    learned_variance: bool,
) -> tuple[Tensor, Tensor]:
    """(x_s, x0) in the dtype of ``row``; differentiable in x, both outputs and the noise."""
    dtype, channels = row.dtype, x.shape[1]
    x, out = x.to(dtype), model_output[:, :channels].to(dtype)
    if uncond_output is not None:
        uncond = uncond_output[:, :channels].to(dtype)
        out = uncond + row[Column.GUIDANCE] * (out - uncond)
    x0 = row[Column.P_X] * x + row[Column.P_O] * out
    x0 = torch.maximum(torch.minimum(x0, row[Column.CLIP]), -row[Column.CLIP])
    x_s = row[Column.C_X] * x + row[Column.C_O] * out + row[Column.C_0] * x0
    if noise is not None:
        std = row[Column.SIGMA]
        if learned_variance:
            log_variance = row[Column.L_0] + row[Column.L_1] * model_output[:, channels:].to(dtype)
            std = std * torch.exp(0.5 * log_variance)
        x_s = x_s + std * noise.to(dtype)
    return x_s, x0


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
) -> None:
    """Write x_s into ``out`` and, where given, the clipped x0 into ``x0_out``.

    x, noise, out, x0_out: [N, C, ...]; model_output, uncond_output: [N, C or 2C, ...];
    table: [S, 16]; step: int64 [1]; seed, sample: int64 [N], or None for no drawn noise.
    ``out`` may be ``x``.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    row = table[step[0]].to(dtype)
    if noise is None and seed is not None:
        assert sample is not None
        timestep = row[Column.TIMESTEP].to(torch.int64).expand(x.shape[0])
        noise = philox.normal(seed, sample, timestep, x[0].numel()).view(x.shape)
    x_s, x0 = update(x, model_output, uncond_output, row, noise, learned_variance)
    out.copy_(x_s)
    if x0_out is not None:
        x0_out.copy_(x0)
