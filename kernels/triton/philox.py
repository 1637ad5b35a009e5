"""Philox4x32-10 and Box-Muller in Triton, bit for bit the words of the reference.

Salmon et al. 2011, section 3.3; the specification is in `stepfuse.kernels.philox`. ``tl.randn`` is
not used: its sine and cosine carry a slow path with a table in local memory. Here the logarithm,
sine and cosine are polynomials on a reduced interval (minimax fits, relative errors of 6e-9, 2e-9
and 5e-11 before rounding), so a normal costs about 45 arithmetic instructions and no branch.
"""

# The types inside a kernel are those of Triton's compiler, and its decorator has none:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepfuse.kernels.triton import flat


@triton.jit
def words(seed, sample, timestep, block):
    """Four uint32 words of counter (block, timestep, sample low, sample high), key seed.

    seed, sample, timestep: int64; block: int32, element // 4. Shapes broadcast.
    """
    zero = (block * 0).to(tl.uint32)  # gives scalars the shape of the block
    c0, c1 = block.to(tl.uint32), timestep.to(tl.uint32) + zero
    c2, c3 = sample.to(tl.uint32) + zero, (sample >> 32).to(tl.uint32) + zero
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # ptxas makes one widening multiplication (IMAD.WIDE) of this, where umulhi and a 32-bit
        # product stay two, one of them slower
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b):
    """sqrt(-2 ln u) (cos(pi v), sin(pi v)) of two uint32 words, float32, within 1e-6.

    u = fl32(a) 2^-32 + 2^-33 in (0, 1] and v = fl32(signed b) 2^-31 in [-1, 1].
    """
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # u = (1 + f) 2^e with 1 + f in [sqrt(1/2), sqrt(2)): near u = 1 then e = 0 and f = u - 1 is
    # exact, so that -2 ln u keeps its relative accuracy where it goes to 0
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    e = e.to(tl.float32)
    q = tl.fma(f, 0.15268859, -0.25523099)
    q = tl.fma(q, f, 0.26320389)
    q = tl.fma(q, f, -0.28403524)
    q = tl.fma(q, f, 0.33246714)
    q = tl.fma(q, f, -0.40002453)
    q = tl.fma(q, f, 0.50001645)
    q = tl.fma(q, f, -0.66666663)
    square = f * f
    y = tl.fma(f * square, q, square)
    y = tl.fma(e, -6.389236989057245e-05, y)  # -2 ln 2 in two parts, the first exact times e
    y = tl.fma(f, -2.0, y)
    y = tl.fma(e, -1.38623046875, y)
    # rsqrt.approx (2 ulp) and one Newton step: half an ulp for less than sqrt.rn. The bound keeps
    # u = 1, whose radius is 0, off 0 * inf.
    y = tl.maximum(y, 1e-30)
    inverse = tl.rsqrt(y)
    radius = y * inverse
    radius = tl.fma(0.5 * inverse, tl.fma(-radius, radius, y), radius)

    v = b.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    # k = round(2 v) through the mantissa of 1.5 2^23 + 2 v; t = v - k / 2 is exact, |t| <= 1/4
    shifted = tl.fma(v, 2.0, 12582912.0)
    k = shifted.to(tl.int32, bitcast=True)
    t = tl.fma(shifted - 12582912.0, -0.5, v)
    z = t * t
    c = tl.fma(z, 0.23142954, -1.3350585)
    c = tl.fma(c, z, 4.058708)
    c = tl.fma(c, z, -4.934802)
    cosine = tl.fma(c, z, 1.0)
    s = tl.fma(z, -0.58882533, 2.5497495)
    s = tl.fma(s, z, -5.167708)
    s = tl.fma(s, z, -8.742278e-08)  # pi - fl32(pi)
    sine = tl.fma(t, 3.1415927, t * s)
    odd = (k & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    # cos is negative in the quadrants k = 1, 2 and sin in k = 2, 3 (mod 4)
    first = tl.where(((k + 1) & 2) != 0, -first, first)
    second = tl.where((k & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def quads(seed, sample, timestep, block):
    """Normals of elements 4 block .. 4 block + 3, in element order: [4 len(block)]."""
    a, b, c, d = words(seed, sample, timestep, block)
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    pairs = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(pairs, (4 * block.shape[0],))


@triton.jit
def single(seed, sample, timestep, element):
    """The normal of each element on its own: one counter an element, so four times the work.

    For samples whose size is not a multiple of 16, where the four elements of a counter do not
    stand at a fixed place of a vector.
    """
    w0, w1, w2, w3 = words(seed, sample, timestep, element >> 2)
    upper = (element & 2) != 0
    even, odd = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, odd, even)


@triton.jit
def draw(
    seed, sample, timestep, start, element, pixels, channels,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Normals of one block of `flat.place`: quads where it lies inside one sample, in C order.

    LAST: ``element`` counts in channels-last order, and is turned into C order.
    """
    if LAST:
        pixel = element // channels
        element = (element - pixel * channels) * pixels + pixel
    if ROWS and not LAST:
        noise = quads(seed, sample, timestep, (start >> 2) + tl.arange(0, BLOCK // 4))
    else:
        noise = single(seed, sample, timestep, element)
    return noise


@triton.jit
def _fill_block(out, noise, offset, limit, MASKED: tl.constexpr):
    if MASKED:
        tl.store(out + offset, noise.to(out.dtype.element_ty), mask=offset < limit)
    else:
        tl.store(out + offset, noise.to(out.dtype.element_ty))


@triton.jit
def _fill(
    out, seed, sample, timestep, length, total, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    row, first, start, limit, element = flat.place(length, total, blocks, BLOCK, ROWS)
    noise = draw(
        tl.load(seed + row), tl.load(sample + row), tl.load(timestep + row), start, element,
        1, length, BLOCK, ROWS, False,
    )  # fmt: skip
    offset = tl.arange(0, BLOCK)
    if limit >= BLOCK:
        _fill_block(out + first, noise, offset, limit, False)
    else:
        _fill_block(out + first, noise, offset, limit, True)


def fill(out: Tensor, seed: Tensor, sample: Tensor, timestep: Tensor) -> None:
    """Write the normals of N samples into contiguous ``out`` [N, ...], any float dtype.

    seed, sample, timestep: int64 [N].
    """
    grid = flat.Grid.of(out, per_sample=True)
    with flat.on_device(out):
        _fill[(grid.programs,)](
            out, seed, sample, timestep, grid.length, grid.total, grid.blocks,
            BLOCK=flat.BLOCK, ROWS=grid.rows, **flat.OPTIONS,
        )  # fmt: skip
