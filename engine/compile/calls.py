"""The arguments of a call ``model(x, t, **condition)``: what tells one from another."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepfuse.engine.compile.state.values import setting_key
from stepfuse.kernels.torch_names import FakeTensor, pytree

_ANY = " of any value"


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of the arguments, keyword arguments in the order of their names."""
    ordered = dict(sorted(kwargs.items())) if len(kwargs) > 1 else kwargs
    return pytree.tree_flatten((args, ordered))


def key(leaf: Any) -> Any:
    """Equal for leaves that one graph serves: tensors of one kind, equal values of all else.

    Raises TypeError for an object that holds tensors where nobody sees them.
    """
    if isinstance(leaf, Tensor):
        # a forward may ask whether its input is contiguous
        kind = (
            leaf.shape,
            leaf.dtype,
            leaf.device,
            leaf.is_contiguous(),
            leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last),
        )
        return kind
    if isinstance(leaf, np.ndarray) and leaf.dtype != object:
        return "array", (leaf.shape, leaf.dtype.str, leaf.tobytes())
    return "setting", setting_key(leaf, "an argument")


def of_any_value(part: Any) -> Any:
    """What is left of a `key` where the value of what is no tensor does not count."""
    return (f"{part[0]}{_ANY}", None) if part[0] in ("setting", "array") else part


def is_of_any_value(part: Any) -> bool:
    """Whether it is what `of_any_value` leaves of a setting or an array."""
    return isinstance(part[0], str) and part[0].endswith(_ANY)


def is_number(value: Any) -> bool:
    """A Python or NumPy number, such as a timestep may be."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def as_declared(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, the first ``count`` (x and the timestep) by position, whatever they were
    given by.
    """
    if len(args) < count and kwargs and "forward" not in vars(model):
        by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
        declared = list(inspect.signature(type(model).forward).parameters.values())[1 : 1 + count]
        for parameter in declared[len(args) :]:
            if parameter.kind is not by_position or parameter.name not in kwargs:
                break
            kwargs = dict(kwargs)
            args = (*args, kwargs.pop(parameter.name))
    return args, kwargs


def fakeness(leaves: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """The mode of fake tensors among ``leaves``: what is made for them must be fake too."""
    fakes = (leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    return next(fakes, contextlib.nullcontext())


def have_values(leaves: Sequence[Any]) -> bool:
    """Whether every tensor among them has data."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)


def described(parts: Iterable[Any]) -> str:
    """The keys of a call's leaves in words."""
    return ", ".join(_in_words(part) for part in parts)


def _in_words(part: Any) -> str:
    if len(part) == 5:
        return f"{list(part[0])} {str(part[1]).removeprefix('torch.')}"
    kind, value = part
    if kind == "setting":
        value = value[-1] if isinstance(value, tuple) and value else value
        return repr(value)
    return f"a {kind}"
