"""One sampler update, read off a row of the step table (see `stepfuse.kernels.step_row`)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.checks import check_range
from stepfuse.kernels.reference import philox
from stepfuse.kernels.step_row import Column, HistoryColumn


def row_of(table: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Row ``step`` [1] of the table [S, 16]: [16].

    NaN where there is none, which on a GPU would end every later call, too.
    """
    there = step.view(1).clamp(0, len(table) - 1)
    row = table.index_select(0, there)[0].to(dtype)
    return torch.where(step.view(1) == there, row, torch.nan)


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
    x, out = x.to(dtype), guided(model_output, uncond_output, row, channels)
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


def guided(
    model_output: Tensor, uncond_output: Tensor | None, row: Tensor, channels: int
) -> Tensor:
    """o, [N, C, ...] in the dtype of ``row``: without a variance, and guided where there are two.

    Ho & Salimans 2022, eq. 6.
    """
    out = model_output[:, :channels].to(row.dtype)
    if uncond_output is None:
        return out
    uncond = uncond_output[:, :channels].to(row.dtype)
    return uncond + row[Column.GUIDANCE] * (out - uncond)


def remembered(history: Tensor, memory: Tensor) -> Tensor:
    """sum_k C_Hk h_k, [N, C, ...]; an h of weight 0 may hold anything, NaN too.

    NaN where ``memory`` [8] is.
    """
    weights = memory[: len(history)].view(-1, *[1] * (history.dim() - 1))
    return torch.where(weights == 0, 0.0, weights * history).sum(dim=0)


def remember(history: Tensor, memory: Tensor, x: Tensor, out: Tensor, x0: Tensor) -> None:
    """h_w <- H_X x + H_O o + H_0 x0 for w = WRITE; nothing where there is no such w."""
    new = (
        memory[HistoryColumn.H_X] * x.to(memory.dtype)
        + memory[HistoryColumn.H_O] * out
        + memory[HistoryColumn.H_0] * x0
    )
    for slot in range(len(history)):
        here = memory[HistoryColumn.WRITE] == slot
        history[slot].copy_(torch.where(here, new, history[slot]))


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

    x, noise, out, x0_out: [N, C, ...]; model_output, uncond_output: [N, C or 2C, ...];
    table: [S, 16]; step: int64 [1]; seed, sample: int64 [N], or None for no drawn noise.
    ``out`` may be ``x``. history: [K, N, C, ...], of which the row of history_table [S, 8] may
    write one.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_range("step", step.view(1), len(table) - 1, IndexError)
    row = row_of(table, step, dtype)
    if noise is None and seed is not None:
        assert sample is not None
        timestep = row[Column.TIMESTEP].to(torch.int64).expand(x.shape[0])
        noise = philox.normal(seed, sample, timestep, x[0].numel()).view(x.shape)
    x_s, x0 = update(x, model_output, uncond_output, row, noise, learned_variance)
    if history is not None:
        assert history_table is not None
        memory = row_of(history_table, step, dtype)
        x_s = x_s + remembered(history, memory)
        out_of_model = guided(model_output, uncond_output, row, x.shape[1])
        remember(history, memory, x, out_of_model, x0)
    out.copy_(x_s)
    if x0_out is not None:
        x0_out.copy_(x0)


def gradients(
    d_out: Tensor | None,
    d_x0: Tensor | None,
    x: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    row: Tensor,
    noise: Tensor | None,
    learned_variance: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `update` with respect to x, both outputs and the noise, as formulas.

    With g = d_out, and g0 = c_0 g + d_x0 where x0 is not clipped, 0 where it is,

        dx = c_x g + p_x g0     do = c_o g + p_o g0     dz = std g     dw = L_1 std z g / 2
        do_cond = guidance do   do_uncond = (1 - guidance) do

    in the dtype of ``row``; made of differentiable operations, so that they have gradients too.
    """
    dtype, channels = row.dtype, x.shape[1]
    x, out = x.to(dtype), model_output[:, :channels].to(dtype)
    guidance = row[Column.GUIDANCE]
    if uncond_output is not None:
        uncond = uncond_output[:, :channels].to(dtype)
        out = uncond + guidance * (out - uncond)
    g = torch.zeros_like(x) if d_out is None else d_out.to(dtype)
    g0 = row[Column.C_0] * g
    if d_x0 is not None:
        g0 = g0 + d_x0.to(dtype)
    clipped = (row[Column.P_X] * x + row[Column.P_O] * out).abs() > row[Column.CLIP]
    g0 = g0.masked_fill(clipped, 0)
    d_x = row[Column.C_X] * g + row[Column.P_X] * g0
    d_cond = row[Column.C_O] * g + row[Column.P_O] * g0
    d_uncond = None
    if uncond_output is not None:
        d_cond, d_uncond = guidance * d_cond, (1 - guidance) * d_cond
    d_variance, d_noise = torch.zeros_like(x), None
    if noise is not None:
        std = row[Column.SIGMA]
        if learned_variance:
            log_variance = row[Column.L_0] + row[Column.L_1] * model_output[:, channels:].to(dtype)
            std = std * torch.exp(0.5 * log_variance)
            d_variance = 0.5 * row[Column.L_1] * std * noise.to(dtype) * g
        d_noise = std * g
    if model_output.shape[1] > channels:
        d_cond = torch.cat((d_cond, d_variance), dim=1)
        if d_uncond is not None:
            d_uncond = torch.cat((d_uncond, torch.zeros_like(d_uncond)), dim=1)
    return d_x, d_cond, d_uncond, d_noise
