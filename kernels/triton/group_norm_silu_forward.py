"""GroupNorm, AdaGN modulation and SiLU: each tile of x read once where its groups fit on chip.

Same contract as the reference. One pass where `group_norm_silu_plan` finds room for whole groups in
registers; otherwise a pass that writes partial statistics and a second that combines them in a
fixed order and applies them. No atomics: results are bitwise repeatable.
"""

# The types inside a kernel are those of Triton's compiler, and its decorator has none:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepfuse.kernels.triton import flat
from stepfuse.kernels.triton import group_norm_silu_tile as tile
from stepfuse.kernels.triton.group_norm_silu_plan import Plan, ceil_power, plan


@triton.jit
def _statistics(
    x, add, partials, plane, add_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr,
    CHANNEL_PARTS: tl.constexpr, LAST: tl.constexpr,
    BLOCKS: tl.constexpr, PIXEL_PARTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Partials [3, N, groups, parts]: elements, mean, squared distances of a run of tiles."""
    program = tl.program_id(0)
    block, part = program % BLOCKS, program // BLOCKS % PIXEL_PARTS
    n = program // (BLOCKS * PIXEL_PARTS)
    first, group, offset, exists = tile.channel_span(
        block, CHANNELS, GROUPS, BLOCK, COLS, CHANNEL_PARTS
    )
    count = 0.0
    mean = tl.zeros((COLS,), tl.float32)
    squares = tl.zeros((COLS,), tl.float32)
    for i in range(TILES):
        pixel = (part * TILES + i) * ROWS
        start, inside, mask = tile.addresses(
            n, first, pixel, exists, CHANNELS, PIXELS, ROWS, COLS, LAST
        )
        values = tl.load(x + start + inside, mask=mask, other=0.0).to(tl.float32)
        # the last part may have tiles that lie past the end; they count for nothing
        rows = tl.maximum(tl.minimum(PIXELS - pixel, ROWS), 0).to(tl.float32)
        tile_mean, tile_squares = tile.statistics(values, mask, tl.maximum(rows, 1.0))
        total = count + rows
        distance = tile_mean - mean
        mean += distance * (rows / total)
        squares += tile_squares + distance * distance * (count * (rows / total))
        count = total
    if add is not None:
        mean += tile.per_channel(add, n * add_stride + first + offset, exists, 0.0)
    member = tile.membership(offset, exists, CHANNELS // GROUPS, HELD)
    elements, group_mean, group_squares = tile.combine_channels(mean, squares, count, member)
    if CHANNEL_PARTS > 1:
        part += block % CHANNEL_PARTS * PIXEL_PARTS
    number = group + tl.arange(0, HELD)
    position = partials + (n.to(tl.int64) * GROUPS + number) * (PIXEL_PARTS * CHANNEL_PARTS) + part
    tl.store(position, elements, mask=number < GROUPS)
    tl.store(position + plane, group_mean, mask=number < GROUPS)
    tl.store(position + 2 * plane, group_squares, mask=number < GROUPS)


@triton.jit
def _apply(
    x, weight, bias, scale, shift, add, out, partials, plane,
    eps, scale_stride, shift_stride, add_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr,
    CHANNEL_PARTS: tl.constexpr, LAST: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """out = act(gain (x + add - mean) rstd + offset); without partials, statistics taken here."""
    # the second pass starts where the first ended, whose data the cache still holds
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block, rest = program % BLOCKS, program // BLOCKS
    DOWN: tl.constexpr = (PIXELS + ROWS - 1) // ROWS
    n, pixel = rest // DOWN, rest % DOWN * ROWS
    first, group, offset, exists = tile.channel_span(
        block, CHANNELS, GROUPS, BLOCK, COLS, CHANNEL_PARTS
    )
    start, inside, mask = tile.addresses(
        n, first, pixel, exists, CHANNELS, PIXELS, ROWS, COLS, LAST
    )
    values = tl.load(x + start + inside, mask=mask, other=0.0).to(tl.float32)
    member = tile.membership(offset, exists, CHANNELS // GROUPS, HELD)
    added = tile.per_channel(add, n * add_stride + first + offset, exists, 0.0)
    if partials is None:
        mean, squares = tile.statistics(values, mask, PIXELS)
        elements, group_mean, group_squares = tile.combine_channels(
            mean + added, squares, PIXELS, member
        )
        variance = group_squares / elements
    else:
        group_mean, variance = tile.combine_parts(
            partials, plane, n, group, GROUPS, PARTS, PADDED, HELD
        )
    # the add is the same for a whole channel: it moves the mean, and no element needs it
    mean = tile.to_channels(group_mean, member) - added
    rstd = tile.to_channels(tl.rsqrt(variance + eps), member)
    gain, bias_ = tile.modulation(
        weight, bias, scale, shift, n, first + offset, exists, scale_stride, shift_stride
    )
    gain *= rstd
    m = (values - mean[None, :]) * gain[None, :] + bias_[None, :]
    if SILU:
        m *= tile.sigmoid(m)
    tl.store(out + start + inside, m.to(out.dtype.element_ty), mask=mask)


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    out: Tensor,
) -> None:
    """Write act((1 + scale) GN(x + add) + shift) into ``out``, which may be ``x``.

    x, out: dense [N, C, ...] of one dtype and layout; weight, bias: [C]; scale, shift, add: [N, C]
    with neighbouring channels side by side, of any float dtype.
    """
    p = plan(x, groups)
    with flat.on_device(x):
        partials = None if p.one_pass else statistics(x, add, p)
        _apply[(p.samples * p.blocks * p.tiles,)](
            x, weight, bias, scale, shift, add, out, partials, p.samples * p.groups * p.parts,
            eps, row_stride(scale), row_stride(shift), row_stride(add),
            **p.constants(), BLOCKS=p.blocks,
            PARTS=p.parts, PADDED=ceil_power(p.parts), SILU=silu, **p.options(),
        )  # fmt: skip


def statistics(x: Tensor, add: Tensor | None, p: Plan) -> Tensor:
    """Partial statistics of x + add: float32 [3, N, groups, parts]."""
    partials = torch.empty(3, p.samples, p.groups, p.parts, dtype=torch.float32, device=x.device)
    _statistics[(p.samples * p.blocks * p.pixel_parts,)](
        x, add, partials, partials[0].numel(), row_stride(add),
        **p.constants(), BLOCKS=p.blocks, PIXEL_PARTS=p.pixel_parts, TILES=p.tiles_per_part,
        **p.options(),
    )  # fmt: skip
    return partials


def row_stride(v: Tensor | None) -> int:
    """Elements between two samples of [N, C]."""
    return 0 if v is None else v.stride(0)
