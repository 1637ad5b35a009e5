"""Counter-based noise: sample n at timestep t, whatever the batch, the device or the backend.

    Philox4x32-10 (Salmon et al. 2011)
    key     = seed, 64 bit
    counter = (element // 4, timestep, sample index low, sample index high)

Two Box-Muller pairs turn the four words of a counter into the normals of four neighbouring
elements (in C order). The initial x_T uses timestep `INITIAL`, which no schedule reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.kernels.backends import implementation, resolve
from stepfuse.kernels.checks import per_sample
from stepfuse.kernels.reference import philox as reference

INITIAL = 2**32 - 1


def normal(
    seed: int | Tensor,
    sample: int | Tensor,
    step: int | Tensor,
    shape: Sequence[int],
    backend: str = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of one sample, or of many.

    Args:
        seed: 64-bit seed, an int or int64 [N].
        sample: sample index; an int gives one sample, int64 [N] gives N.
        step: index on the training schedule, or `INITIAL`; an int or int64 [N].
        shape: of one sample, (C, H, W) say.
        backend: "auto", "reference", "cpp" or "triton".
        dtype: of the result; values are computed in float32 (float64 in the reference).
        device: where the result goes; taken from ``sample`` where that is a tensor.

    Returns ``shape`` for an int ``sample``, [N, *shape] for a tensor of N.
    """
    device = sample.device if isinstance(sample, Tensor) else torch.device(device)
    count = len(sample) if isinstance(sample, Tensor) else 1
    out = torch.empty((count, *shape), dtype=dtype, device=device)
    if out.numel():
        run = implementation("philox", resolve(backend, device, dtype)).fill
        run(out, *_counters(seed, sample, step, count, device))
    return out if isinstance(sample, Tensor) else out[0]


def integers(
    seed: int | Tensor, sample: int | Tensor, step: int | Tensor, shape: Sequence[int]
) -> Tensor:
    """The raw 32-bit words behind `normal`, one an element, as int64 in [0, 2^32)."""
    device = sample.device if isinstance(sample, Tensor) else torch.device("cpu")
    count = len(sample) if isinstance(sample, Tensor) else 1
    counters = _counters(seed, sample, step, count, device)
    words = reference.integers(*counters, math.prod(shape)).view(count, *shape)
    return words if isinstance(sample, Tensor) else words[0]


def _counters(
    seed: int | Tensor, sample: int | Tensor, step: int | Tensor, count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(step, int) and not 0 <= step <= INITIAL:
        raise ValueError(f"step must be in 0 .. 2^32-1; got {step}")
    return (
        per_sample("seed", seed, count, device),
        per_sample("sample", sample, count, device),
        per_sample("step", step, count, device),
    )
