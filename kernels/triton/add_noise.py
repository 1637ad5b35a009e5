"""x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps in one pass; same contract as the reference."""

# The types inside a kernel are those of Triton's compiler, and its decorator has none:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepfuse.kernels.triton import flat, philox


@triton.jit
def _block(
    x0, noise, out, target, eps, signal, sigma, first, limit,
    VELOCITY: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.arange(0, BLOCK)
    mask = (offset < limit) if MASKED else None
    x = tl.load(x0 + first + offset, mask=mask).to(tl.float32)
    if noise is not None:
        eps = tl.load(noise + first + offset, mask=mask).to(tl.float32)
    x_t = signal * x + sigma * eps
    tl.store(out + first + offset, x_t.to(out.dtype.element_ty), mask=mask)
    if target is not None:
        if VELOCITY:
            eps = signal * eps - sigma * x
        tl.store(target + first + offset, eps.to(target.dtype.element_ty), mask=mask)


# a schedule of another length is another number, not another kernel
@triton.jit(do_not_specialize=["timesteps"])
def _kernel(
    x0, noise, t, alphas_cumprod, seed, sample, out, target,
    timesteps, length, total, blocks, pixels, channels,
    VELOCITY: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    row, first, start, limit, element = flat.place(length, total, blocks, BLOCK, ROWS)
    timestep = tl.load(t + row)
    # nobody has looked at a timestep on the device: one that the table has not gives NaN
    known = (timestep >= 0) & (timestep < timesteps)
    abar = tl.load(alphas_cumprod + timestep, mask=known, other=float("nan"))
    # 1 - abar in float64, where abar near 1 would cost float32 its digits; the roots in float32,
    # because a float64 root is slow on most cards and changes nothing
    signal = tl.sqrt_rn(abar.to(tl.float32))
    sigma = tl.sqrt_rn((1.0 - abar).to(tl.float32))
    eps = None
    if noise is None:
        eps = philox.draw(
            tl.load(seed + row), tl.load(sample + row), timestep, start, element,
            pixels, channels, BLOCK, ROWS, LAST,
        )  # fmt: skip
    if limit >= BLOCK:
        _block(
            x0, noise, out, target, eps, signal, sigma, first, limit, VELOCITY, False, BLOCK
        )  # fmt: skip
    else:
        _block(
            x0, noise, out, target, eps, signal, sigma, first, limit, VELOCITY, True, BLOCK
        )  # fmt: skip


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

    x0, noise, out, target: [N, ...] of one dtype; t: int64 [N]; alphas_cumprod: float64 [T];
    seed, sample: int64 [N], used where ``noise`` is None. ``out`` may be ``x0``. x_t and v are NaN
    where t is outside 0 .. T-1.
    """
    grid = flat.Grid.of(x0, per_sample=True)
    channels = x0.shape[1] if x0.dim() > 1 else 1
    with flat.on_device(x0):
        _kernel[(grid.programs,)](
            x0, noise, t, alphas_cumprod, seed, sample, out, target,
            len(alphas_cumprod), grid.length, grid.total, grid.blocks, grid.length // channels,
            channels,
            VELOCITY=velocity, BLOCK=flat.BLOCK, ROWS=grid.rows, LAST=flat.is_channels_last(x0),
            **flat.OPTIONS,
        )  # fmt: skip
