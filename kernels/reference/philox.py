"""Philox4x32-10 (Salmon et al. 2011, section 3.3) and Box-Muller in plain PyTorch integers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def rounds(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Ten rounds. Counters and keys are int64 tensors holding 32-bit words; returns [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, so shifting and masking gives the unsigned halves
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)  # type: ignore[no-untyped-call]


def integers(seed: Tensor, sample: Tensor, timestep: Tensor, elements: int) -> Tensor:
    """Words for elements 0 .. elements-1 of each sample: int64 [N, elements] in [0, 2^32).

    ``seed``, ``sample`` and ``timestep`` are int64 [N]; the counter of element e is
    (e // 4, timestep, sample low, sample high), the key (seed low, seed high), and e % 4 selects
    one of the four words.
    """
    block = torch.arange(-(-elements // 4), device=seed.device)[None, :]
    seed, sample, timestep = seed[:, None], sample[:, None], timestep[:, None]
    words = rounds(
        (block, timestep & _MASK, sample & _MASK, sample >> 32 & _MASK),
        (seed & _MASK, seed >> 32 & _MASK),
    )
    return words.flatten(1)[:, :elements]


def normal(seed: Tensor, sample: Tensor, timestep: Tensor, elements: int) -> Tensor:
    """Standard normals of each sample: float64 [N, elements].

    Words (a, b) give the pair  sqrt(-2 ln u) (cos(pi v), sin(pi v))  with

        u = fl32(fl32(a) 2^-32 + 2^-33)   in (0, 1]      v = fl32(signed(b)) 2^-31   in [-1, 1]

    words 0, 1 of a block giving elements 0, 1 and words 2, 3 elements 2, 3. The two float32
    roundings are part of the definition; everything after them is exact here and within 1e-6 in
    the fast backends.
    """
    words = integers(seed, sample, timestep, -(-elements // 4) * 4).view(len(seed), -1, 2)
    a, b = words[..., 0], words[..., 1]
    u = a.to(torch.float32) * 2.0**-32 + 2.0**-33
    v = (b - (b >> 31 << 32)).to(torch.float32) * 2.0**-31
    radius = (-2.0 * u.double().log()).sqrt()
    angle = math.pi * v.double()
    pair = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pair.flatten(1)[:, :elements]


def fill(out: Tensor, seed: Tensor, sample: Tensor, timestep: Tensor) -> None:
    """Write the normals of N samples into ``out`` [N, ...], any float dtype."""
    out.copy_(normal(seed, sample, timestep, out[0].numel()).view(out.shape))
