"""The gradients of group_norm_silu, statistics recomputed; formulas in the reference's `backward`.

With Q, P, R the sums of dm, dm n and n over the pixels of a channel, gain = (1 + scale) weight and
<.> the mean over a group, everything but dx follows from three numbers a channel:

    <dn> = <gain Q>      <dn n> = <gain P>      dx = rstd (gain dm - <dn> - n <dn n>)
    dshift = Q    dscale = weight P + bias Q    dadd = rstd (gain Q - pixels <dn> - R <dn n>)
    dbias = sum_n (1 + scale) Q                 dweight = sum_n (1 + scale) P

One pass where x and grad of whole groups fit into registers. Otherwise statistics, sums, their
combination and dx are four launches. Partial sums are added in a fixed order.
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
from stepfuse.kernels.triton.group_norm_silu_forward import row_stride, statistics
from stepfuse.kernels.triton.group_norm_silu_plan import ceil_power, plan

ONE_PASS = 8192  # two tiles are held, so half of the forward's
TILE_OF_SUMS = tl.constexpr(1024)  # elements of a tile of partial sums
PARAMETER_COLS, PARAMETER_ROWS = 32, 32


@triton.jit
def _normalised(values, grads, mask, mean, rstd, gain, offset, SILU: tl.constexpr):
    """(n, dm) of a tile; n is 0 where masked, and so is dm because the gradient is."""
    n = tl.where(mask, (values - mean[None, :]) * rstd[None, :], 0.0)
    if SILU:
        m = n * gain[None, :] + offset[None, :]
        s = tile.sigmoid(m)
        grads *= s * (1.0 + m * (1.0 - s))
    return n, grads


@triton.jit
def _group_means(q, p, gain, member, elements):
    """(<dn>, <dn n>) of each group."""
    return tile.over_channels(gain * q, member) / elements, (
        tile.over_channels(gain * p, member) / elements
    )


@triton.jit
def _store_per_sample(
    weight, bias, dscale, dshift, dadd, n, channel, exists, q, p, r, gain, rstd, first, second,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dscale, dshift and dadd of one sample; first, second: <dn>, <dn n> of the channel's group."""
    position = n.to(tl.int64) * CHANNELS + channel
    if dscale is not None:
        w = tile.per_channel(weight, channel, exists, 1.0)
        b = tile.per_channel(bias, channel, exists, 0.0)
        tl.store(dscale + position, w * p + b * q, mask=exists)
    if dshift is not None:
        tl.store(dshift + position, q, mask=exists)
    if dadd is not None:
        tl.store(dadd + position, rstd * (gain * q - PIXELS * first - r * second), mask=exists)


@triton.jit
def _sums(
    grad, x, weight, bias, scale, shift, add, dx, dscale, dshift, dadd, sums, partials, plane,
    sums_plane, eps, scale_stride, shift_stride, add_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr,
    CHANNEL_PARTS: tl.constexpr, LAST: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """sums [3, N, tiles, C]: Q, P, R; without partials, all gradients of the tile's groups too."""
    program = tl.program_id(0)
    block, rest = program % BLOCKS, program // BLOCKS
    DOWN: tl.constexpr = (PIXELS + ROWS - 1) // ROWS
    n, part = rest // DOWN, rest % DOWN
    first, group, offset, exists = tile.channel_span(
        block, CHANNELS, GROUPS, BLOCK, COLS, CHANNEL_PARTS
    )
    start, inside, mask = tile.addresses(
        n, first, part * ROWS, exists, CHANNELS, PIXELS, ROWS, COLS, LAST
    )
    values = tl.load(x + start + inside, mask=mask, other=0.0).to(tl.float32)
    grads = tl.load(grad + start + inside, mask=mask, other=0.0).to(tl.float32)
    channel = first + offset
    member = tile.membership(offset, exists, CHANNELS // GROUPS, HELD)
    added = tile.per_channel(add, n * add_stride + channel, exists, 0.0)
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
    mean = tile.to_channels(group_mean, member) - added
    rstd = tile.to_channels(tl.rsqrt(variance + eps), member)
    gain, bias_ = tile.modulation(
        weight, bias, scale, shift, n, channel, exists, scale_stride, shift_stride
    )
    normal, dm = _normalised(values, grads, mask, mean, rstd, gain, bias_, SILU)
    q, p, r = tl.sum(dm, 0), tl.sum(dm * normal, 0), tl.sum(normal, 0)
    if sums is not None:
        position = sums + (n.to(tl.int64) * DOWN + part) * CHANNELS + channel
        tl.store(position, q, mask=exists)
        tl.store(position + sums_plane, p, mask=exists)
        tl.store(position + 2 * sums_plane, r, mask=exists)
    if partials is None:
        along, across = _group_means(q, p, gain, member, elements)
        along, across = tile.to_channels(along, member), tile.to_channels(across, member)
        _store_per_sample(
            weight, bias, dscale, dshift, dadd, n, channel, exists, q, p, r, gain, rstd,
            along, across, CHANNELS, PIXELS,
        )  # fmt: skip
        if dx is not None:
            dh = gain[None, :] * dm - along[None, :] - normal * across[None, :]
            dh *= rstd[None, :]
            tl.store(dx + start + inside, dh.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _total(top, exists, DOWN: tl.constexpr, STRIDE: tl.constexpr, COLS: tl.constexpr):
    """Sum of DOWN rows [COLS], some of them at a time so that their loads overlap."""
    ROWS: tl.constexpr = max(TILE_OF_SUMS // COLS, 1)
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, DOWN, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < DOWN)[:, None] & exists[None, :]
        total += tl.sum(tl.load(top[None, :] + row[:, None] * STRIDE, mask=mask, other=0.0), 0)
    return total


@triton.jit
def _finish(
    weight, bias, scale, shift, dscale, dshift, dadd, sums, totals, finished, partials, plane,
    sums_plane, totals_plane, finished_plane, eps, scale_stride, shift_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr, COLS: tl.constexpr,
    DOWN: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Add up the tiles of one group.

    totals [2, N, C] are Q and P; finished [4, N, groups] is mean, rstd, <dn>, <dn n>.
    """
    GROUP: tl.constexpr = CHANNELS // GROUPS
    n, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    offset = tl.arange(0, COLS)
    exists = offset < GROUP
    channel = group * GROUP + offset
    mean, variance = tile.combine_parts(partials, plane, n, group, GROUPS, PARTS, PADDED, 1)
    top = sums + n.to(tl.int64) * (DOWN * CHANNELS) + channel
    q = _total(top, exists, DOWN, CHANNELS, COLS)
    p = _total(top + sums_plane, exists, DOWN, CHANNELS, COLS)
    r = _total(top + 2 * sums_plane, exists, DOWN, CHANNELS, COLS)
    total = totals + n.to(tl.int64) * CHANNELS + channel
    tl.store(total, q, mask=exists)
    tl.store(total + totals_plane, p, mask=exists)
    gain, _ = tile.modulation(
        weight, bias, scale, shift, n, channel, exists, scale_stride, shift_stride
    )
    member = exists[:, None]
    along, across = _group_means(q, p, gain, member, GROUP * PIXELS)
    rstd = tl.rsqrt(variance + eps)
    _store_per_sample(
        weight, bias, dscale, dshift, dadd, n, channel, exists, q, p, r, gain,
        tile.to_channels(rstd, member), tile.to_channels(along, member),
        tile.to_channels(across, member), CHANNELS, PIXELS,
    )  # fmt: skip
    position = finished + n.to(tl.int64) * GROUPS + group + tl.arange(0, 1)
    tl.store(position, mean)
    tl.store(position + finished_plane, rstd)
    tl.store(position + 2 * finished_plane, along)
    tl.store(position + 3 * finished_plane, across)


@triton.jit
def _dx(
    grad, x, weight, bias, scale, shift, add, dx, finished, plane,
    scale_stride, shift_stride, add_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr,
    CHANNEL_PARTS: tl.constexpr, LAST: tl.constexpr, BLOCKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx = rstd (gain dm - <dn> - n <dn n>) of one tile."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block, rest = program % BLOCKS, program // BLOCKS
    DOWN: tl.constexpr = (PIXELS + ROWS - 1) // ROWS
    n, part = rest // DOWN, rest % DOWN
    first, _, offset, exists = tile.channel_span(
        block, CHANNELS, GROUPS, BLOCK, COLS, CHANNEL_PARTS
    )
    start, inside, mask = tile.addresses(
        n, first, part * ROWS, exists, CHANNELS, PIXELS, ROWS, COLS, LAST
    )
    values = tl.load(x + start + inside, mask=mask, other=0.0).to(tl.float32)
    grads = tl.load(grad + start + inside, mask=mask, other=0.0).to(tl.float32)
    channel = first + offset
    position = finished + n.to(tl.int64) * GROUPS + channel // (CHANNELS // GROUPS)
    mean = tl.load(position, mask=exists, other=0.0)
    mean -= tile.per_channel(add, n * add_stride + channel, exists, 0.0)
    rstd = tl.load(position + plane, mask=exists, other=0.0)
    along = tl.load(position + 2 * plane, mask=exists, other=0.0)
    across = tl.load(position + 3 * plane, mask=exists, other=0.0)
    gain, bias_ = tile.modulation(
        weight, bias, scale, shift, n, channel, exists, scale_stride, shift_stride
    )
    normal, dm = _normalised(values, grads, mask, mean, rstd, gain, bias_, SILU)
    dh = gain[None, :] * dm - along[None, :] - normal * across[None, :]
    dh *= rstd[None, :]
    tl.store(dx + start + inside, dh.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _parameters(
    scale, totals, dweight, dbias, samples, plane, scale_stride,
    CHANNELS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dweight, dbias: sums over the samples, ROWS of them at a time."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)
    exists = channel < CHANNELS
    weight_sum = tl.zeros((COLS,), tl.float32)
    bias_sum = tl.zeros((COLS,), tl.float32)
    # no range: of an argument, Triton 3.6 cannot interpret one beside NumPy 2.4
    start = samples * 0
    while start < samples:
        n = (start + tl.arange(0, ROWS))[:, None]
        mask = (n < samples) & exists[None, :]
        one_plus = 1.0 + tile.per_channel(scale, n * scale_stride + channel[None, :], mask, 0.0)
        position = totals + n * CHANNELS + channel[None, :]
        bias_sum += tl.sum(one_plus * tl.load(position, mask=mask, other=0.0), 0)
        weight_sum += tl.sum(one_plus * tl.load(position + plane, mask=mask, other=0.0), 0)
        start += ROWS
    if dweight is not None:
        tl.store(dweight + channel, weight_sum, mask=exists)
    if dbias is not None:
        tl.store(dbias + channel, bias_sum, mask=exists)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
    dadd: Tensor | None,
) -> None:
    """Write the gradients into the tensors given; None skips one.

    grad, x, dx: dense [N, C, ...] of one dtype and layout; dweight, dbias: float32 [C];
    dscale, dshift, dadd: float32 [N, C], contiguous. ``dx`` may be ``grad``.
    """
    p = plan(x, groups, ONE_PASS)
    split, parameters = not p.one_pass, dweight is not None or dbias is not None
    constants = {**p.constants(), "BLOCKS": p.blocks}
    parts = {"PARTS": p.parts, "PADDED": ceil_power(p.parts)}
    strides = row_stride(scale), row_stride(shift), row_stride(add)
    with flat.on_device(x):
        partials = sums = totals = None
        if split:
            partials = statistics(x, add, p)
        if split or parameters:
            shape = (3, p.samples, p.tiles, p.channels)
            sums = totals = torch.empty(shape, dtype=torch.float32, device=x.device)
        plane, sums_plane = p.samples * p.groups * p.parts, p.samples * p.tiles * p.channels
        per_sample = (None, None, None) if split else (dscale, dshift, dadd)
        _sums[(p.samples * p.blocks * p.tiles,)](
            grad, x, weight, bias, scale, shift, add, None if split else dx, *per_sample,
            sums, partials, plane, sums_plane, eps, *strides,
            **constants, **parts, SILU=silu, **p.options(),
        )  # fmt: skip
        if split:
            assert sums is not None
            totals = sums.new_empty(2, p.samples, p.channels)
            finished = torch.empty(4, p.samples, p.groups, dtype=torch.float32, device=x.device)
            _finish[(p.samples * p.groups,)](
                weight, bias, scale, shift, dscale, dshift, dadd,
                sums, totals, finished, partials,
                plane, sums_plane, p.samples * p.channels, p.samples * p.groups, eps, *strides[:2],
                CHANNELS=p.channels, PIXELS=p.pixels, GROUPS=p.groups, COLS=ceil_power(p.group),
                DOWN=p.tiles, **parts, **flat.OPTIONS,
            )  # fmt: skip
            if dx is not None:
                _dx[(p.samples * p.blocks * p.tiles,)](
                    grad, x, weight, bias, scale, shift, add, dx, finished,
                    p.samples * p.groups, *strides, **constants, SILU=silu, **p.options(),
                )  # fmt: skip
        if parameters:
            _parameters[(triton.cdiv(p.channels, PARAMETER_COLS),)](
                scale, totals, dweight, dbias, p.samples, p.samples * p.channels, strides[0],
                CHANNELS=p.channels, COLS=PARAMETER_COLS, ROWS=PARAMETER_ROWS, **flat.OPTIONS,
            )  # fmt: skip
