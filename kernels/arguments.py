"""Argument checks of every floor; messages name the argument, what came and what is accepted.

Those of numbers and of the ops' tensors are in `stepfuse.kernels.checks`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from stepfuse.kernels.backends import FLOAT_DTYPES
from stepfuse.kernels.checks import (
    as_integer,
    as_number,
    check_word,
    float_names,
    is_float,
    received,
    shown,
)
from stepfuse.kernels.limits import check_seed
from stepfuse.kernels.torch_names import FakeTensor

PathLike = str | os.PathLike[str]
PRECISIONS = (None, *FLOAT_DTYPES)


def check_words(name: str, values: Any, accepted: Collection[str]) -> tuple[str, ...]:
    """``values`` as a tuple. Raises unless they are a collection of the ``accepted`` words."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Collection):
        raise TypeError(f"{name} must be a list of words; got {received(values)}")
    for value in values:
        check_word(name, value, accepted)
    return tuple(values)


def check_literal(name: str, value: Any, accepted: Any) -> None:
    """ValueError unless ``value`` is one of the words of a Literal."""
    check_word(name, value, get_args(accepted))


def check_text(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string; got {received(value)}")


def check_kind(name: str, value: Any, kind: Any, accepted: str) -> None:
    """TypeError unless ``value`` is a ``kind``, which the message calls ``accepted``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {accepted}; got {received(value)}")


def check_callable(name: str, value: Any, accepted: str) -> None:
    """TypeError unless ``value`` can be called as it is meant to be; a class makes an instance."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be {accepted}; got {received(value)}")


def check_mapping(name: str, value: Any, accepted: str = "a dict") -> None:
    """TypeError unless ``value`` is a dict with strings for keys, or another mapping."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be {accepted}; got {received(value)}")


def check_path(name: str, value: Any) -> str:
    """``value`` as a string; TypeError unless it is a path, ValueError for one nothing can have."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a path, a string or a pathlib.Path; got {received(value)}")
    path = os.fspath(value)
    if not path or "\0" in path:
        raise ValueError(f"{name} must name a file; got {path!r}")
    return path


def check_precision(name: str, value: Any) -> None:
    """Raise unless ``value`` is None or a dtype that networks are compiled for."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None; got {received(value)}")
    if value not in PRECISIONS:
        names = ", ".join(map(str, PRECISIONS))
        raise ValueError(f"{name} must be one of {names}; got {value}")


def flag_or_precision(name: str, value: Any) -> torch.dtype | None:
    """The dtype that was given, None for True and False; raises for anything else."""
    if isinstance(value, torch.dtype):
        check_precision(name, value)
        return value
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True, False or a torch.dtype; got {received(value)}")
    return None


def check_flag_or_word(name: str, value: Any, word: str) -> None:
    """Raise unless ``value`` is True, False or that word."""
    if isinstance(value, str):
        if value != word:
            raise ValueError(f"{name} must be True, False or {word!r}; got {shown(value)}")
    elif not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True, False or {word!r}; got {received(value)}")


def as_seed(name: str, value: Any) -> int:
    """``value`` as the seed of a generator. Raises unless it is an int of 64 bits."""
    seed = as_integer(name, value)
    check_seed(name, seed)
    return seed


def check_clip(value: Any) -> None:
    """Raise unless ``clip_sample`` is a positive number or None."""
    if value is not None and not 0 < as_number("clip_sample", value, finite=False) < math.inf:
        raise ValueError(f"clip_sample must be positive or None; got {value}")


def as_list(name: str, values: Any, accepted: str, ordered: bool = True) -> list[Any]:
    """The entries of an iterable but text and dicts, and sets where the order means something.

    TypeError for anything else, with what is ``accepted``.
    """
    if isinstance(values, Tensor):
        check_values(name, values)
    elif not ordered and isinstance(values, (set, frozenset)):
        values = list(values)
    unfit = isinstance(values, (str, bytes, set, frozenset, Mapping, type))
    if unfit or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be {accepted}; got {received(values)}")
    if isinstance(values, (Tensor, np.ndarray)):
        if values.ndim != 1:
            raise TypeError(f"{name} must be {accepted}; got shape {tuple(values.shape)}")
        found: list[Any] = values.tolist()
        return found
    return list(values)


def as_integers(name: str, values: Any, accepted: str, ordered: bool = True) -> list[int]:
    """`as_list` of whole numbers; TypeError for others."""
    found = as_list(name, values, accepted, ordered)
    try:
        return [as_integer(name, value) for value in found]
    except TypeError:
        few = tuple(found[:20])
        raise TypeError(
            f"{name} must be {accepted}, whole numbers; got {' '.join(repr(few).split())}"
        ) from None


def as_sizes(name: str, values: Any, least: int = 1) -> tuple[int, ...]:
    """``values`` as a shape; TypeError for what is none, ValueError for a size below ``least``."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name} must be a tuple of sizes; got {received(values)}")
    sizes = tuple(as_integers(name, values, "a tuple of sizes"))
    if any(not least <= size < 2**62 for size in sizes):
        raise ValueError(f"{name} must have every entry at least {least}; got {sizes}")
    return sizes


def as_call(name: str, values: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(x, t, ...) as arguments, a dict at the end as keyword arguments of a model.

    TypeError unless they start with a tensor.
    """
    listed = isinstance(values, (tuple, list))
    if not listed or not values or not isinstance(values[0], Tensor):
        kinds = ", ".join(type(value).__name__ for value in values) if listed else ""
        got = f"({kinds})" if listed else received(values)
        raise TypeError(f"{name} must be (x, t, ...) and start with the tensor x; got {got}")
    if not isinstance(values[-1], dict):
        return tuple(values), {}
    check_mapping(f"the last of {name}", values[-1], "a dict of keyword arguments")
    return tuple(values[:-1]), values[-1]


def check_tensor(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {received(value)}")


def check_on_device(name: str, value: Any) -> None:
    """Raise unless ``value`` is a tensor that is somewhere: fake ones may be, not one on "meta"."""
    check_tensor(name, value)
    if value.device.type == "meta":
        raise ValueError(f"{name} must hold numbers; got a tensor on {value.device}")


def check_dtype_kind(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """TypeError unless ``value`` holds floats, integers or truth values, as ``dtype`` does."""
    if _number_kind(value.dtype) != _number_kind(dtype):
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: {dtype}")


def _number_kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool


def check_values(name: str, value: Any) -> None:
    """Raise unless ``value`` is a dense tensor with numbers in it: not on "meta", not a fake."""
    check_tensor(name, value)
    if isinstance(value, FakeTensor) or value.is_meta:
        raise ValueError(f"{name} must hold numbers; got a tensor that has a shape only")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor; got one of {value.layout}")


def check_floats(name: str, value: Any) -> None:
    """`check_values`, and TypeError unless the numbers are floats that the ops take."""
    check_values(name, value)
    if not is_float(value.dtype):
        raise TypeError(f"{name} must be one of {float_names()}; got {value.dtype}")
