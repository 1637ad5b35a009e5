"""Argument checks the ops share; every message names the value received and what is accepted."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepfuse.kernels.backends import FLOAT_DTYPES

FLOATS = (*FLOAT_DTYPES, torch.float64)  # of the ops; float64 by the reference alone
_LAST = 2**63 - 1
LARGEST = torch.finfo(torch.float32).max
INDICES = "an int or an int64 tensor"  # what per-sample arguments accept


def as_integer(name: str, value: Any, accepted: str = "an int") -> int:
    """``value`` as an int: an integer of Python or NumPy; TypeError for all else, bools too.

    The error says what is ``accepted``.
    """
    if type(value) is int:
        return value
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {accepted}; got {received(value)}") from None


def as_number(name: str, value: Any, finite: bool = True) -> float:
    """``value`` as a float: an int or a float of Python or NumPy, finite in float32.

    TypeError for all else, bools and tensors too; ValueError for NaN, for infinity, and for numbers
    past 3.4e38, which become infinite where tables are rounded to float32. ``finite=False`` leaves
    values to a caller that has a range to name.
    """
    if type(value) is float and -LARGEST <= value <= LARGEST:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be an int or a float; got {received(value)}")
    number: Any = value
    if abs(number) <= LARGEST:
        return float(number)
    if finite:
        raise ValueError(f"{name} must be finite, and at most {LARGEST:.3g}; got {value}")
    return math.nan if number != number else math.copysign(math.inf, number)


def check_real(name: str, x: Any) -> None:
    """TypeError unless x is a tensor of real numbers: floats, integers or bools."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.is_complex():
        raise TypeError(f"{name} must be real; got {x.dtype}")


def check_flag(name: str, value: Any) -> None:
    """TypeError unless ``value`` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {received(value)}")


def check_word(name: str, value: Any, accepted: Collection[str], *more: str) -> None:
    """ValueError unless ``value`` is one of the ``accepted`` words; ``more`` is named besides."""
    if not isinstance(value, str) or value not in accepted:
        words = " or ".join((", ".join(accepted), *more))
        raise ValueError(f"{name} must be one of {words}; got {shown(value)}")


def check_dtype(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a dtype of floats of 16, 32 or 64 bits."""
    if not isinstance(value, torch.dtype) or not is_float(value):
        what = value if isinstance(value, torch.dtype) else shown(value)
        raise TypeError(f"{name} must be {float_names()}, a floating-point type; got {what}")


def check_shape(name: str, shape: Any) -> None:
    """Raise unless ``shape`` is a tuple or list of sizes, 0 among them; symbolic ones will do."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of sizes; got {received(shape)}")
    for size in shape:
        if isinstance(size, torch.SymInt):
            continue
        if not 0 <= as_integer(name, size, "a tuple of sizes") <= _LAST:
            raise ValueError(f"{name} must have sizes of at least 0; got {tuple(shape)}")


def as_device(name: str, value: Any) -> torch.device:
    """``value`` as a device. Raises TypeError or ValueError for what names none."""
    if isinstance(value, torch.device):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a torch.device or its name; got {received(value)}")
    try:
        return torch.device(value)
    except RuntimeError:
        raise ValueError(
            f"{name} must name a device, 'cpu' or 'cuda:0' say; got {value!r}"
        ) from None


def check_float(name: str, x: Any) -> None:
    """TypeError unless x is a tensor of floats of 16, 32 or 64 bits."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {received(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {float_names()}; got {x.dtype}")


def float_names() -> str:
    """The dtypes that `check_float` accepts, in words."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)


def is_float(dtype: Any) -> bool:
    """Whether `check_float` accepts tensors of this dtype."""
    return dtype in FLOATS


def check_like(name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raise unless x holds floats, has ``shape`` and lives on the device of ``like``."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        check_float(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the input; got {x.device}")


def check_out(name: str, out: Tensor, like: Tensor) -> None:
    """Raise unless ``out`` can take a result of the shape and dtype of ``like``."""
    check_like(name, out, like.shape, like)
    if out.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like the input; got {out.dtype}")


def check_range(name: str, values: Tensor, last: int, error: type[Exception]) -> None:
    """Raise ``error`` unless int64 ``values`` are in 0 .. last; not read where not on the CPU."""
    if not values.is_cpu or not values.numel():
        return
    # for a few numbers, a list costs a fraction of a reduction
    ends = values.tolist() if len(values) <= 64 else [int(end) for end in torch.aminmax(values)]
    if min(ends) < 0 or max(ends) > last:
        raise error(f"{name} must be in 0 .. {last}; got {min(ends)} .. {max(ends)}")


def per_sample(name: str, value: int | Tensor, count: int, device: torch.device) -> Tensor:
    """``value`` as int64 [count] on ``device``: an int is repeated, a tensor checked.

    A tensor that is one already comes back as it is, without a copy or a read on the host. Ints
    are taken modulo 2^64, so that an unsigned 64-bit seed keeps its bits.
    """
    if isinstance(value, Tensor):
        if value.dtype is torch.int64 and value.shape == (count,) and value.device == device:
            return value.contiguous()
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be {INDICES}; got {value.dtype}")
        if value.dim() > 1 or value.numel() not in (1, count):
            raise ValueError(
                f"{name} must hold one value or one per sample ({count}); got {tuple(value.shape)}"
            )
        if value.device != device:
            if value.is_meta:
                raise ValueError(f"{name} must hold numbers; got a tensor on {value.device}")
            value = value.to(device)
        return value.to(torch.int64).expand(count).contiguous()
    return torch.full((count,), _signed(name, value), dtype=torch.int64, device=device)


def sample_indices(
    first: int | Tensor, count: int, device: torch.device, name: str = "sample"
) -> Tensor:
    """Sample numbers as int64 [count]: first, first+1, ... for an int, the tensor itself otherwise.

    Numbers are 64-bit patterns too: the one after 2^63 - 1 is -2^63, that is 2^63.
    """
    if isinstance(first, Tensor):
        if first.shape != (count,):
            raise ValueError(f"{name} must have shape ({count},); got {tuple(first.shape)}")
        return per_sample(name, first, count, device)
    start = _signed(name, first)
    if start + count <= _LAST:
        return torch.arange(start, start + count, dtype=torch.int64, device=device)
    return torch.full((count,), start, device=device) + torch.arange(count, device=device)


def _signed(name: str, value: Any) -> int:
    """The int64 with the 64 bits of ``value``."""
    number = as_integer(name, value, INDICES)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{name} must fit in 64 bits; got {number}")
    return number - 2**64 if number > _LAST else number


def shown(value: Any) -> str:
    """A word in a message: itself in quotes, or what came in its place."""
    return repr(value) if isinstance(value, str) else received(value)


def received(value: Any) -> str:
    """An argument in a message: its type, and simple values with it."""
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{kind} {value!r}" if isinstance(value, (bool, int, float, complex, str)) else kind
