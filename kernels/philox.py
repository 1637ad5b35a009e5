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
from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels.backends import BackendUnavailable, function, implementation, resolve
from stepfuse.kernels.checks import (
    INDICES,
    as_device,
    as_integer,
    check_dtype,
    check_float,
    check_like,
    check_range,
    check_shape,
    per_sample,
)
from stepfuse.kernels.layout import buffer_for, resolved
from stepfuse.kernels.overlap import check_memory
from stepfuse.kernels.registration import define, eager, raise_versions

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
    out: Tensor | None = None,
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
        out: where to write the result instead, of its shape, dtype and device.

    Returns ``shape`` for an int ``sample``, [N, *shape] for a tensor of N. Raises ValueError or
    TypeError for values out of range, `BackendUnavailable` where ``backend`` cannot run.
    """
    check_shape("shape", shape)
    check_dtype("dtype", dtype)
    many = isinstance(sample, Tensor)
    named = as_device("device", device)
    device = sample.device if isinstance(sample, Tensor) else named
    count = len(sample) if isinstance(sample, Tensor) else 1
    counters = _counters(seed, sample, step, count, device)
    if out is None:
        if eager(*counters):
            drawn = _functional(*counters, shape, dtype, backend)
        else:
            drawn = _OP(*counters, shape, dtype, backend)
        return drawn if many else drawn[0]
    check_like("out", out, (count, *shape) if many else shape, counters[1])
    target = out if many else out[None]
    call = _write_out if eager(*counters, target) else _OP_OUT
    call(*counters, backend, out=target)
    return out


def integers(
    seed: int | Tensor,
    sample: int | Tensor,
    step: int | Tensor,
    shape: Sequence[int],
    backend: str = "reference",
) -> Tensor:
    """The raw 32-bit words behind `normal`, one an element, as int64 in [0, 2^32).

    Of "reference" and "cpp"; Triton kernels turn the words into normals before they store them.
    """
    check_shape("shape", shape)
    device = sample.device if isinstance(sample, Tensor) else torch.device("cpu")
    count = len(sample) if isinstance(sample, Tensor) else 1
    counters = resolved(*_counters(seed, sample, step, count, device))
    check_range("step", counters[2], INITIAL, ValueError)
    if isinstance(backend, str) and backend == "triton":
        raise BackendUnavailable("the triton backend does not store integers; use the reference")
    chosen = resolve(backend, device)
    module = implementation("philox", "reference" if chosen == "triton" else chosen)
    words: Tensor = module.integers(*counters, math.prod(shape)).view(count, *shape)
    return words if isinstance(sample, Tensor) else words[0]


def _counters(
    seed: int | Tensor, sample: int | Tensor, step: int | Tensor, count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(step, Tensor):
        step = as_integer("step", step, INDICES)
        if not 0 <= step <= INITIAL:
            raise ValueError(f"step must be in 0 .. 2^32-1; got {step}")
    return (
        per_sample("seed", seed, count, device),
        per_sample("sample", sample, count, device),
        per_sample("step", step, count, device),
    )


def _write(seed: Tensor, sample: Tensor, step: Tensor, backend: str, out: Tensor) -> None:
    if not out.numel():
        return
    seed, sample, step = resolved(seed, sample, step)
    check_range("step", step, INITIAL, ValueError)
    target = buffer_for(out, torch.contiguous_format)  # elements are numbered in C order
    function("philox", "fill", backend, out)(target, seed, sample, step)
    if target is not out:
        out.copy_(target)


def _write_out(seed: Tensor, sample: Tensor, step: Tensor, backend: str, *, out: Tensor) -> None:
    check_memory({"out": out}, {}, (seed, sample, step))
    _write(seed, sample, step, backend, out)
    raise_versions((out,))


def _functional(
    seed: Tensor, sample: Tensor, step: Tensor, shape: Sequence[int], dtype: Any, backend: str
) -> Tensor:
    out = _fake(seed, sample, step, shape, dtype, backend)
    check_float("dtype", out)
    _write(seed, sample, step, backend, out)
    return out


def _fake(
    seed: Tensor, sample: Tensor, step: Tensor, shape: Sequence[int], dtype: Any, backend: str
) -> Tensor:
    return torch.empty((sample.shape[0], *shape), dtype=dtype, device=sample.device)


_COUNTERS = "Tensor seed, Tensor sample, Tensor step"

_OP = define(
    f"philox_normal({_COUNTERS}, SymInt[] shape, ScalarType dtype, str backend) -> Tensor",
    _functional,
    _fake,
)
_OP_OUT = define(
    f"philox_normal_out({_COUNTERS}, str backend, *, Tensor(a!) out) -> ()",
    _write_out,
    lambda *args, **kwargs: None,
)
