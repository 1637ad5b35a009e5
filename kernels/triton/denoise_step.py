"""One sampler update by a row of the step table, in one pass; same contract as the reference.

Nothing that changes from step to step is an argument by value: the row is read at ``step[0]`` in
device memory, seeds and sample numbers from tensors, so a captured launch serves every step.
"""

# The types inside a kernel are those of Triton's compiler, and its decorator has none:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepfuse.kernels import step_row
from stepfuse.kernels.step_row import Column, HistoryColumn
from stepfuse.kernels.triton import flat, philox

# a kernel sees globals only where they are declared constant
COLUMNS = tl.constexpr(step_row.COLUMNS)
P_X, P_O = tl.constexpr(int(Column.P_X)), tl.constexpr(int(Column.P_O))
C_X, C_O = tl.constexpr(int(Column.C_X)), tl.constexpr(int(Column.C_O))
C_0, CLIP = tl.constexpr(int(Column.C_0)), tl.constexpr(int(Column.CLIP))
L_0, L_1 = tl.constexpr(int(Column.L_0)), tl.constexpr(int(Column.L_1))
SIGMA, GUIDANCE = tl.constexpr(int(Column.SIGMA)), tl.constexpr(int(Column.GUIDANCE))
TIMESTEP = tl.constexpr(int(Column.TIMESTEP))
MEMORY = tl.constexpr(step_row.HISTORY_COLUMNS)
C_H0, WRITE = tl.constexpr(int(HistoryColumn.C_H0)), tl.constexpr(int(HistoryColumn.WRITE))
H_X, H_O = tl.constexpr(int(HistoryColumn.H_X)), tl.constexpr(int(HistoryColumn.H_O))
H_0 = tl.constexpr(int(HistoryColumn.H_0))


@triton.jit
def _block(
    x, model_output, uncond, noise, out, x0_out, history, row, memory, known, z, variance,
    first, output_first, limit, output_offset, total,
    K: tl.constexpr, DRAWN: tl.constexpr, LEARNED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.arange(0, BLOCK)
    mask = (offset < limit) if MASKED else None
    x_t = tl.load(x + first + offset, mask=mask).to(tl.float32)
    o = tl.load(model_output + output_first + output_offset, mask=mask).to(tl.float32)
    if uncond is not None:
        base = tl.load(uncond + output_first + output_offset, mask=mask).to(tl.float32)
        o = base + tl.load(row + GUIDANCE) * (o - base)
    clip = tl.load(row + CLIP)
    # NaN here is NaN in x_s, whatever C_0 is
    p_x = tl.where(known, tl.load(row + P_X), float("nan"))
    x0 = p_x * x_t + tl.load(row + P_O) * o
    # torch's clamp lets NaN through, and so does this
    x0 = tl.minimum(x0, clip, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.maximum(x0, -clip, propagate_nan=tl.PropagateNan.ALL)
    x_s = tl.load(row + C_X) * x_t + tl.load(row + C_O) * o + tl.load(row + C_0) * x0
    for slot in tl.static_range(K):
        weight = tl.load(memory + C_H0 + slot) + tl.zeros((BLOCK,), tl.float32)
        read = weight != 0  # in all lanes or in none
        if MASKED:
            read = read & mask
        # what is not read may be NaN, and 0 NaN is one
        x_s += weight * tl.load(history + slot * total + first + offset, mask=read, other=0.0)
    if K:
        to = tl.where(known, tl.load(memory + WRITE), -1.0)
        lanes = to + tl.zeros((BLOCK,), tl.float32)
        write = (lanes >= 0) & (lanes < K)
        if MASKED:
            write = write & mask
        new = tl.load(memory + H_X) * x_t + tl.load(memory + H_O) * o + tl.load(memory + H_0) * x0
        tl.store(history + to.to(tl.int64) * total + first + offset, new, mask=write)
    if noise is not None:
        z = tl.load(noise + first + offset, mask=mask).to(tl.float32)
    if DRAWN or noise is not None:
        std = tl.load(row + SIGMA)
        if LEARNED:
            w = tl.load(model_output + output_first + variance + output_offset, mask=mask)
            log_variance = tl.load(row + L_0) + tl.load(row + L_1) * w.to(tl.float32)
            std = std * tl.exp(0.5 * log_variance)  # ex2.approx, 2 ulp
        x_s += std * z
    tl.store(out + first + offset, x_s.to(out.dtype.element_ty), mask=mask)
    if x0_out is not None:
        tl.store(x0_out + first + offset, x0.to(x0_out.dtype.element_ty), mask=mask)


# a table of another length is another number, not another kernel
@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x, model_output, uncond, table, step, noise, seed, sample, out, x0_out, history, history_table,
    rows, length, total, blocks, pixels, channels,
    K: tl.constexpr, DRAWN: tl.constexpr, LEARNED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    number, first, start, limit, element = flat.place(length, total, blocks, BLOCK, ROWS)
    index = tl.load(step)
    # nobody has looked at a counter on the device: a row that the table has not gives NaN
    known = (index >= 0) & (index < rows)
    row = table + tl.where(known, index, 0) * COLUMNS
    memory = None
    if K:
        memory = history_table + tl.where(known, index, 0) * MEMORY
    z = None
    if DRAWN:
        z = tl.zeros((BLOCK,), tl.float32)
        if tl.load(row + SIGMA) != 0:  # the one captured launch serves steps without noise too
            z = philox.draw(
                tl.load(seed + number), tl.load(sample + number),
                tl.load(row + TIMESTEP).to(tl.int64),
                start, element, pixels, channels, BLOCK, ROWS, LAST,
            )  # fmt: skip
    # where the model output of an element stands: beside x or, with twice the channels (WIDE), in
    # rows or pixels twice as long; the variance of an element follows ``variance`` elements later
    variance = channels if LAST else length
    offset = tl.arange(0, BLOCK)
    output_first = first
    if WIDE:
        if LAST:
            offset += (element // channels + number * pixels) * channels
        elif ROWS:
            output_first += number * length
        else:
            offset += number * length
    if limit >= BLOCK:
        _block(
            x, model_output, uncond, noise, out, x0_out, history, row, memory, known, z, variance,
            first, output_first, limit, offset, total, K, DRAWN, LEARNED, False, BLOCK,
        )  # fmt: skip
    else:
        _block(
            x, model_output, uncond, noise, out, x0_out, history, row, memory, known, z, variance,
            first, output_first, limit, offset, total, K, DRAWN, LEARNED, True, BLOCK,
        )  # fmt: skip


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
    table: [S, 16]; step: int64 [1]; seed, sample: int64 [N], or None for no drawn noise. ``out``
    may be ``x``. Both results are NaN where ``step`` is outside 0 .. S-1. history: [K, N, C, ...],
    float32, of which the row of history_table [S, 8] may write one.
    """
    drawn = noise is None and seed is not None
    wide = model_output.shape != x.shape
    count, channels = x.shape[:2]
    grid = flat.Grid.of(x, per_sample=drawn or wide)
    with flat.on_device(x):
        _kernel[(grid.programs,)](
            x, model_output, uncond_output, table, step, noise,
            seed if drawn else None, sample if drawn else None, out, x0_out, history, history_table,
            len(table), grid.length, grid.total, grid.blocks, grid.total // (count * channels),
            channels,
            K=0 if history is None else len(history),
            DRAWN=drawn, LEARNED=learned_variance, WIDE=wide,
            BLOCK=flat.BLOCK, ROWS=grid.rows, LAST=flat.is_channels_last(x), **flat.OPTIONS,
        )  # fmt: skip
