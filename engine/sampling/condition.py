"""Conditions of any structure: checked, cut into batches, and kept in buffers that never move.

A condition is a dict of a model's keyword arguments. Its values are tensors, NumPy arrays and
settings (numbers, strings, None, ...), in dicts, lists, tuples, namedtuples and whatever else
`torch.utils._pytree` knows, nested as deep as one likes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepfuse.engine.compile.state.values import is_value, setting_key
from stepfuse.kernels.torch_names import pytree


@dataclass(frozen=True)
class Place:
    """Where in a condition a value is, in words: ``condition 'added_cond_kwargs.image_embeds'``."""

    noun: str
    path: str = ""

    def of(self, key: Any) -> Place:
        """The place of an entry."""
        if not isinstance(key, str):
            return Place(self.noun, f"{self.path}[{key!r}]")
        return Place(self.noun, f"{self.path}.{key}" if self.path else key)

    def __str__(self) -> str:
        return f"{self.noun} {self.path!r}" if self.path else self.noun


@dataclass(frozen=True)
class Kept:
    """In a replacement: leaf ``index`` of the condition stays."""

    index: int


def check_condition(
    condition: Mapping[str, Any] | None, count: int, device: torch.device
) -> dict[str, Any]:
    """The condition with its arrays as tensors, on the device, entries in the order of their names.

    A list of numbers, or of such lists, that is itself an entry stands for a tensor.

    Raises TypeError or ValueError, naming the entry, for a tensor that has not ``count`` entries or
    is not dense, and for what could not be followed from call to call (`setting_key`).
    """

    def leaf(value: Any, place: Place) -> Any:
        value = _tensor_or_setting(value, place)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0 or value.shape[0] != count:
            raise ValueError(
                f"{place} must have one entry per sample ({count}); got shape {tuple(value.shape)}"
            )
        return value.to(device)

    return {
        name: _mapped(_numbers(value, place), place, leaf)
        for name, value, place in _entries(condition, "condition")
    }


def check_replacement(
    condition: dict[str, Any],
    unconditional: Mapping[str, Any],
    count: int,
    device: torch.device,
    batched: bool,
) -> dict[str, Any]:
    """What ``unconditional`` makes of a checked condition: its entries, `Kept` where it has none.

    Dicts are replaced key by key, lists and tuples of one length entry by entry, anything else as a
    whole. A tensor or number in the place of a tensor is spread to its shape and dtype; a tensor
    that replaces none is spread over the batch.

    Raises TypeError or ValueError, naming the entry, for what cannot be spread, and with
    ``batched`` where the two conditions differ in more than the values of tensors.
    """
    numbers = itertools.count()
    kept = pytree.tree_map(lambda _: Kept(next(numbers)), condition)
    given = {
        name: _numbers(value, place)
        for name, value, place in _entries(unconditional, "unconditional")
    }
    spread = _Spread(count, device)
    replaced = spread.merged(given, condition, kept, Place("unconditional"))
    if batched:
        _check_batched(replaced, condition, Place("unconditional"))
    return dict(sorted(replaced.items()))


def split_condition(condition: Any, start: int, stop: int) -> Any:
    """The condition of samples ``start`` .. ``stop`` - 1: tensors are cut, the rest is shared."""
    return pytree.tree_map_only(Tensor, lambda v: v[start:stop], condition)


def pick_condition(condition: Any, which: Tensor) -> Any:
    """The condition of the samples of these numbers, int64 [B] on its device, in their order."""
    return pytree.tree_map_only(Tensor, lambda v: v[which], condition)


def structure_key(tree: Any) -> Hashable:
    """Structure, shapes and dtypes, and the values of settings: equal where one program serves."""
    children, spec, _ = _level(tree)
    if spec.is_leaf():
        if isinstance(tree, Tensor):
            return "tensor", tuple(tree.shape), tree.dtype
        return setting_key(tree, "condition")
    context = setting_key(spec.context, "condition")
    return spec.type, context, tuple(structure_key(child) for child in children)


class Staged:
    """A condition and its unconditional twin in buffers, which a captured step reads again.

    Args:
        condition: an example, checked; tensors are copied.
        replacement: of `check_replacement`; None where there is no second evaluation.

    ``changeable`` lists the settings that are no mere values (functions, objects), by their place;
    ``takes_both`` says whether ``both`` can be had.
    """

    def __init__(self, condition: Any, replacement: Any = None) -> None:
        with torch.inference_mode(False):  # to be written to outside of it, too
            self._condition, self._replacement = pytree.tree_map_only(
                Tensor, torch.clone, (condition, replacement)
            )
        self.changeable = self._changeable()
        self.takes_both = _differ_in_tensors_only(self._replacement, self._condition)

    def load(self, condition: Any, replacement: Any = None) -> None:
        """Take over tensors, into the buffers, and settings; of the structure of the example."""

        def filled(buffer: Any, value: Any) -> Any:
            return buffer.copy_(value) if isinstance(buffer, Tensor) else value

        self._condition = pytree.tree_map(filled, self._condition, condition)
        self._replacement = pytree.tree_map(filled, self._replacement, replacement)
        self.changeable = self._changeable()

    def _changeable(self) -> list[tuple[str, Any]]:
        """Settings, by place, that may mean something else to the model later: no mere values."""
        found = []

        def leaf(value: Any, place: Place) -> None:
            if not (isinstance(value, (Tensor, Kept)) or is_value(value)):
                found.append((str(place), value))

        _mapped(self._condition, Place("condition"), leaf)
        _mapped(self._replacement, Place("unconditional"), leaf)
        return found

    @property
    def condition(self) -> dict[str, Any]:
        """For one call of a model, which may change dicts and lists that are handed to it."""
        fresh: dict[str, Any] = pytree.tree_map(lambda v: v, self._condition)
        return fresh

    @property
    def unconditional(self) -> dict[str, Any]:
        """The condition with its replacements, likewise."""
        if self._replacement is None:
            return self.condition
        leaves = pytree.tree_leaves(self._condition)
        replaced: dict[str, Any] = pytree.tree_map(
            lambda v: leaves[v.index] if isinstance(v, Kept) else v, self._replacement
        )
        return replaced

    @property
    def both(self) -> dict[str, Any]:
        """The unconditional half and the conditional one in tensors of twice the batch."""
        doubled: dict[str, Any] = pytree.tree_map(
            lambda u, c: torch.cat([u, c]) if isinstance(c, Tensor) else c,
            self.unconditional,
            self.condition,
        )
        return doubled

    def nbytes(self) -> int:
        """Bytes of the buffers."""
        leaves = pytree.tree_leaves((self._condition, self._replacement))
        return sum(v.nbytes for v in leaves if isinstance(v, Tensor))


class _Spread:
    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device

    def merged(self, new: Any, like: Any, kept: Any, place: Place) -> Any:
        """``new`` in the place of ``like``; ``kept`` has the structure of ``like``."""
        if isinstance(new, Mapping) and isinstance(like, dict):
            result = copy.copy(kept)
            for key, value in new.items():
                result[key] = self.merged(value, like.get(key), kept.get(key), place.of(key))
            return result
        children, spec, keys = _level(new)
        like_children, like_spec, _ = _level(like)
        alike = not spec.is_leaf() and spec.type is like_spec.type
        if alike and len(children) == len(like_children):
            entries = zip(children, like_children, _level(kept)[0], keys, strict=True)
            return pytree.tree_unflatten(
                [self.merged(v, old, k, place.of(key)) for v, old, k, key in entries], spec
            )
        old = like if spec.is_leaf() else None
        return _mapped(new, place, lambda value, at: self._leaf(value, old, at))

    def _leaf(self, value: Any, like: Any, place: Place) -> Any:
        if isinstance(like, Tensor) and isinstance(value, (int, float, np.number, np.bool_)):
            value = torch.tensor(value)
        value = _tensor_or_setting(value, place)
        if not isinstance(value, Tensor):
            return value
        if isinstance(like, Tensor):
            if not torch.can_cast(value.dtype, like.dtype):
                raise TypeError(
                    f"{place} must be of a type that becomes {like.dtype} without loss; "
                    f"got {value.dtype}"
                )
            shape, value = tuple(like.shape), value.to(like)
        else:
            shape, value = (self._count, *value.shape[1:]), value.to(self._device)
        try:
            return value.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{place} must be broadcastable to {shape}; got shape {tuple(value.shape)}"
            ) from None


def _check_batched(replaced: Any, like: Any, place: Place) -> None:
    """Raise ValueError where the two halves of a batch need more than tensors of twice its size."""
    if isinstance(replaced, Kept):
        return
    children, spec, keys = _level(replaced)
    like_children, like_spec, like_keys = _level(like)
    if (spec.type, keys) != (like_spec.type, like_keys):
        raise ValueError(
            f"batched guidance needs the same entries on both sides; {place} is "
            f"{_described(replaced)}, where the condition has {_described(like)}"
        )
    if not spec.is_leaf():
        for child, old, key in zip(children, like_children, keys, strict=True):
            _check_batched(child, old, place.of(key))
    elif isinstance(replaced, Tensor) != isinstance(like, Tensor):
        lacks = place if isinstance(like, Tensor) else Place("condition", place.path)
        raise ValueError(
            f"batched guidance needs a tensor for {lacks}; got "
            f"{_described(replaced if lacks is place else like)}, where the other half has a tensor"
        )
    elif not isinstance(like, Tensor) and setting_key(replaced, "") != setting_key(like, ""):
        raise ValueError(
            f"batched guidance has one setting for both halves; {place} is {replaced!r}, where the "
            f"condition has {like!r}"
        )


def _differ_in_tensors_only(replaced: Any, like: Any) -> bool:
    if replaced is None:
        return True
    try:
        _check_batched(replaced, like, Place("unconditional"))
    except ValueError:
        return False
    return True


def _described(value: Any) -> str:
    _, spec, keys = _level(value)
    if spec.is_leaf():
        return "a tensor" if isinstance(value, Tensor) else repr(value)
    return f"{type(value).__name__} of {', '.join(map(repr, keys)) or 'nothing'}"


def _entries(condition: Any, noun: str) -> list[tuple[str, Any, Place]]:
    if not isinstance(condition, (Mapping, type(None))):
        raise TypeError(
            f"{noun} must be a dict of the model's keyword arguments, {{'labels': ...}} say; "
            f"got {type(condition).__name__}"
        )
    for name in condition or {}:
        if not isinstance(name, str):
            raise TypeError(f"{noun} must have the names of arguments as keys; got {name!r}")
    return [(name, value, Place(noun, name)) for name, value in sorted((condition or {}).items())]


def _numbers(value: Any, place: Place) -> Any:
    """A list of numbers as a tensor; anything else as it is."""
    if not _is_numbers(value):
        return value
    try:
        return torch.tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{place} must be a list that makes a tensor; got {error}") from None


def _is_numbers(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    numbers = (int, float, np.number, np.bool_)
    return all(isinstance(v, numbers) for v in value) or all(map(_is_numbers, value))


def _tensor_or_setting(value: Any, place: Place) -> Any:
    """A dense tensor without history for a tensor or an array; anything else if it can be kept."""
    if isinstance(value, np.ndarray):
        value = _from_numpy(value, place)
    if not isinstance(value, Tensor):
        setting_key(value, str(place))
        return value
    if value.layout is not torch.strided or value.is_nested or value.is_meta:
        kind = "one without data (meta)" if value.is_meta else f"a {value.layout} one"
        raise TypeError(f"{place} must be a dense tensor; got {kind}")
    return value.detach()


def _from_numpy(value: np.ndarray[Any, Any], place: Place) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{place} must be an array without a mask; got a masked array")
    try:
        # a copy has an order and strides that PyTorch knows
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise TypeError(
            f"{place} must be an array of numbers that PyTorch knows; got dtype {value.dtype}"
        ) from None


def _mapped(
    value: Any, place: Place, leaf: Callable[[Any, Place], Any], within: tuple[int, ...] = ()
) -> Any:
    """The structure with ``leaf(value, place)`` for every leaf."""
    children, spec, keys = _level(value)
    if spec.is_leaf():
        return leaf(value, place)
    if id(value) in within:
        raise ValueError(f"{place} must not contain itself; got {type(value).__name__}")
    inner = (*within, id(value))
    entries = zip(children, keys, strict=True)
    return pytree.tree_unflatten(
        [_mapped(child, place.of(key), leaf, inner) for child, key in entries], spec
    )


def _level(value: Any) -> tuple[list[Any], Any, list[Any]]:
    """The entries of a structure, how to put them together again, and their names."""
    first = itertools.chain([False], itertools.repeat(True))
    children, spec = pytree.tree_flatten(value, is_leaf=lambda _: next(first))
    keys = list(range(len(children)))
    if isinstance(value, Mapping):
        keys = list(value)
    elif hasattr(value, "_fields"):
        keys = list(value._fields)
    return children, spec, keys if len(keys) == len(children) else list(range(len(children)))
