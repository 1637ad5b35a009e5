"""Device functions group_norm_silu's kernels share: tiles, statistics, the affine part.

A tile is float32 [ROWS, COLS], pixels by channels. Statistics are taken per channel first, as
(mean, sum of squared distances from it), then combined over the channels of a group and over tiles
with the formula of Chan, Golub & LeVeque 1983 (eq. 2.1), always in the same order.
"""

# The types inside a kernel are those of Triton's compiler, and its decorator has none:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_span(
    block,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr,
    CHANNEL_PARTS: tl.constexpr,
):  # fmt: skip
    """(first channel, first group, offsets [COLS], which of them exist) of a tile."""
    GROUP: tl.constexpr = CHANNELS // GROUPS
    offset = tl.arange(0, COLS)
    exists = tl.full((COLS,), True, tl.int1)
    if COLS > BLOCK:
        exists = offset < BLOCK
    if CHANNEL_PARTS > 1:
        group = block // CHANNEL_PARTS
        inside = (block % CHANNEL_PARTS) * BLOCK
        if GROUP % BLOCK != 0:
            exists = exists & (inside + offset < GROUP)
        first = group * GROUP + inside
    else:
        first = block * BLOCK
        group = block * (BLOCK // GROUP)
        if CHANNELS % BLOCK != 0:
            exists = exists & (first + offset < CHANNELS)
    return first, group, offset, exists


@triton.jit
def addresses(
    n, first_channel, first_pixel, exists,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(int64 position of a tile's first element, int32 offsets from it, mask), [ROWS, COLS]."""
    start = n.to(tl.int64) * (CHANNELS * PIXELS)
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    inside = tl.full((ROWS,), True, tl.int1)
    if PIXELS % ROWS != 0:
        inside = first_pixel + row < PIXELS
    mask = inside[:, None] & exists[None, :]
    if LAST:
        start += first_pixel.to(tl.int64) * CHANNELS + first_channel
        offset = row[:, None] * CHANNELS + col
    else:
        start += first_channel.to(tl.int64) * PIXELS + first_pixel
        offset = col * PIXELS + row[:, None]
    return start, offset, mask


@triton.jit
def per_channel(pointer, position, exists, default: tl.constexpr):
    """float32 [COLS] from a parameter, or ``default`` where it is None."""
    if pointer is None:
        values = tl.full(exists.shape, default, tl.float32)
    else:
        values = tl.load(pointer + position, mask=exists, other=default).to(tl.float32)
    return values


@triton.jit
def statistics(x, mask, count):
    """(mean, sum of squared distances) of each column over its ``count`` rows; masked x is 0.

    The second sweep also finds what rounding left in the mean and takes it out of both.
    """
    mean = tl.sum(x, 0) / count
    distance = tl.where(mask, x - mean[None, :], 0.0)
    left = tl.sum(distance, 0) / count
    squares = tl.sum(distance * distance, 0) - left * left * count
    return mean + left, squares


@triton.jit
def membership(offset, exists, GROUP: tl.constexpr, HELD: tl.constexpr):
    """[COLS, HELD]: which channel of a tile is of which of its groups."""
    member = exists[:, None]
    if HELD > 1:
        member = (offset[:, None] // GROUP == tl.arange(0, HELD)[None, :]) & member
    return member


@triton.jit
def over_channels(values, member):
    """Sum of [COLS] over the channels of each group: [HELD]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def to_channels(values, member):
    """[HELD] handed to the channels of each group: [COLS]."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def combine_channels(mean, squares, count, member):
    """(elements, mean, squares) of each group, from those of its channels, ``count`` rows each."""
    width = tl.maximum(tl.sum(member.to(tl.float32), 0), 1.0)
    group_mean = over_channels(mean, member) / width
    distance = mean - to_channels(group_mean, member)
    group_squares = over_channels(squares + count * distance * distance, member)
    return width * count, group_mean, group_squares


@triton.jit
def combine_parts(
    partials, plane, n, first_group,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """(mean, variance) of the groups of a tile [HELD] from partials [3, N, GROUPS, PARTS]."""
    group = first_group + tl.arange(0, HELD)[:, None]
    part = tl.arange(0, PADDED)[None, :]
    exists = (group < GROUPS) & (part < PARTS)
    position = partials + (n.to(tl.int64) * GROUPS + group) * PARTS + part
    counts = tl.load(position, mask=exists, other=0.0)
    means = tl.load(position + plane, mask=exists, other=0.0)
    squares = tl.load(position + 2 * plane, mask=exists, other=0.0)
    total = tl.maximum(tl.sum(counts, 1), 1.0)
    # around the first mean, so that a large common part does not round
    base = tl.sum(tl.where(part == 0, means, 0.0), 1)
    mean = base + tl.sum(counts * tl.where(exists, means - base[:, None], 0.0), 1) / total
    distance = means - mean[:, None]
    return mean, tl.sum(squares + counts * distance * distance, 1) / total


@triton.jit
def modulation(weight, bias, scale, shift, n, channel, exists, scale_stride, shift_stride):
    """(gain, offset) [COLS] with m = gain n + offset: weight, bias and AdaGN in one."""
    one_plus = 1.0 + per_channel(scale, n * scale_stride + channel, exists, 0.0)
    gain = per_channel(weight, channel, exists, 1.0) * one_plus
    offset = per_channel(bias, channel, exists, 0.0) * one_plus
    return gain, offset + per_channel(shift, n * shift_stride + channel, exists, 0.0)


@triton.jit
def sigmoid(m):
    """1 / (1 + exp(-m)), by ex2.approx and an approximate division (2 ulp each)."""
    return 1.0 / (1.0 + tl.exp(-m))
