"""What a condition holds beside tensors, and how one such value is told from another."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (
    type(None),
    int,
    str,
    bytes,
    Enum,
    range,
    type,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_REFERENCES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
)
_ARRAYS = ("__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__")
_MOST = 100_000


def setting_key(value: Any, name: str) -> Hashable:
    """Something hashable that is equal for two values only where they mean the same to a model.

    Numbers, strings and the like count by value and type (0, 0.0, -0.0 and False are four values),
    containers by their entries, functions by identity. Any other object counts by its equality
    where it has one of its own, by its identity otherwise, and always by its attributes as they are
    now, so that a changed object is another value.

    Raises TypeError, which calls the value ``name``, where tensors, arrays or raw memory are in it:
    what they hold is not seen from outside. So does a value of more than a hundred thousand parts.
    """
    return _Keys(name, value).of(value, "")


class _Keys:
    def __init__(self, name: str, root: Any) -> None:
        self._name, self._root = name, root
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is used twice
        self._parts = 0

    def of(self, value: Any, where: str) -> Hashable:
        kind = type(value)
        self._parts += 1
        if self._parts > _MOST:
            raise self._refusal(f"has more than {_MOST} parts, too many to compare at every call")
        if isinstance(value, float):
            return kind, value.hex()
        if isinstance(value, complex):
            return kind, value.real.hex(), value.imag.hex()
        if isinstance(value, np.generic) and value.dtype.kind != "O":
            return kind, value.dtype.str, value.tobytes()
        if isinstance(value, (*_PLAIN, *_REFERENCES)):
            return kind, value
        if isinstance(value, Tensor) or any(hasattr(kind, name) for name in _ARRAYS):
            what = "a tensor" if isinstance(value, Tensor) else f"an array ({_named(kind)})"
            raise self._refusal(f"holds {what}{f' at {where}' if where else ''}")
        if _is_memory(value):
            raise self._refusal(f"holds memory ({_named(kind)}){f' at {where}' if where else ''}")
        if id(value) in self._met:
            return "again", self._met[id(value)]
        self._met[id(value)] = len(self._met)
        self._alive.append(value)
        return kind, *self._contents(value, where), self._state(value, where)

    def _contents(self, value: Any, where: str) -> tuple[Hashable, ...]:
        """Entries of a container; for anything else what it is equal to."""
        if isinstance(value, Mapping):
            return tuple(
                (self.of(k, f"{where}[{k!r}]"), self.of(v, f"{where}[{k!r}]"))
                for k, v in value.items()
            )
        if isinstance(value, (Sequence, deque)):
            return tuple(self.of(v, f"{where}[{i}]") for i, v in enumerate(value))
        if isinstance(value, Set):
            return (frozenset(self.of(v, where) for v in value),)
        by_identity: Any = object.__hash__
        if type(value).__hash__ is by_identity:
            return (Same(value),)
        try:
            hash(value)
        except TypeError:
            return (Same(value),)
        return (value,)

    def _state(self, value: Any, where: str) -> tuple[Hashable, ...]:
        attributes = sorted(_attributes(value), key=lambda item: str(item[0]))
        return tuple((name, self.of(held, f"{where}.{name}")) for name, held in attributes)

    def _refusal(self, reason: str) -> TypeError:
        return TypeError(
            f"{self._name} must be of tensors, NumPy arrays and settings, in dicts, lists, tuples "
            f"or classes that torch.utils._pytree knows; got {_named(type(self._root))}, which "
            f"{reason}"
        )


class Same:
    """Equal to what is the same object, and keeps it, so that no other gets its address."""

    __slots__ = ("_object",)

    def __init__(self, value: Any) -> None:
        self._object = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._object is other._object

    def __hash__(self) -> int:
        return id(self._object)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds in its ``__dict__`` and its slots, those of built-in types included."""
    yield from list(getattr(value, "__dict__", {}).items())
    for cls in type(value).__mro__:
        for name, member in list(vars(cls).items()):
            if isinstance(member, types.MemberDescriptorType) and name != "__dict__":
                try:
                    yield name, member.__get__(value)
                except AttributeError:
                    continue  # a slot that was never filled


def _is_memory(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _named(kind: type) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"
