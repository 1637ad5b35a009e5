"""Philox noise and its integers by the C++ module; the contract is that of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.cpp.module import DTYPES, native, threads


def integers(seed: Tensor, sample: Tensor, timestep: Tensor, elements: int) -> Tensor:
    """Words for elements 0 .. elements-1 of each sample: int64 [N, elements] in [0, 2^32)."""
    out = torch.empty((len(seed), elements), dtype=torch.int64)
    seed, sample, timestep = seed.contiguous(), sample.contiguous(), timestep.contiguous()
    native.integers(
        seed.data_ptr(),
        sample.data_ptr(),
        timestep.data_ptr(),
        len(seed),
        elements,
        out.data_ptr(),
        threads(),
    )
    return out


def fill(out: Tensor, seed: Tensor, sample: Tensor, timestep: Tensor) -> None:
    """Write the normals of N samples into ``out`` [N, ...]."""
    dense = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    seed, sample, timestep = seed.contiguous(), sample.contiguous(), timestep.contiguous()
    count = out.shape[0]
    native.fill(
        dense.data_ptr(),
        DTYPES[out.dtype],
        seed.data_ptr(),
        sample.data_ptr(),
        timestep.data_ptr(),
        count,
        out.numel() // count,
        threads(),
    )
    if dense is not out:
        out.copy_(dense)
