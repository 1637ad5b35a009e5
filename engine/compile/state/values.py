"""What a condition holds beside tensors, and how one such value is told from another."""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepfuse.engine.compile.state.code import NOTHING, content, named_in

_PLAIN = (
    type(None),
    int,
    str,
    bytes,
    Enum,
    range,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_REFERENCES = (types.BuiltinFunctionType, types.ModuleType)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy"}  # whose code reads nothing of a user's
_ARRAYS = ("__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__")
_MOST = 100_000
_MOST_OF_CODE = 10_000  # parts that are looked at for the sake of code, which may reach anything


def setting_key(value: Any, name: str) -> Hashable:
    """Something hashable that is equal for two values only where they mean the same to a model.

    Numbers, strings and the like count by value and type (0, 0.0, -0.0 and False are four values),
    containers by their entries. Any other object counts by its equality where it has one of its
    own, by its identity otherwise, and always by its attributes and the values in its class as they
    are now, so that a changed object is another value.

    Functions, methods and classes count by identity and by what their code may read: closures,
    defaults, the globals it names, the object of a method, the values in a class. Tensors, arrays
    and modules count by identity there.

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
        self._in_code = 0

    def of(self, value: Any, where: str) -> Hashable:
        kind = type(value)
        self._parts += 1
        if self._in_code and self._stays_itself(value):
            return Same(value)
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
        if isinstance(value, (types.FunctionType, types.MethodType, type)):
            return kind, self._code(value, where)
        if isinstance(value, Tensor) or any(hasattr(kind, name) for name in _ARRAYS):
            what = "a tensor" if isinstance(value, Tensor) else f"an array ({_named(kind)})"
            raise self._refusal(f"holds {what}{f' at {where}' if where else ''}")
        if _is_memory(value):
            raise self._refusal(f"holds memory ({_named(kind)}){f' at {where}' if where else ''}")
        again = self._again(value)
        if again is not None:
            return again
        values_of_class: Hashable = self._values_of_class(kind)
        named: Any = kind
        return named, *self._contents(value, where), self._state(value, where), values_of_class

    def _again(self, value: Any) -> Hashable | None:
        """What stands for a value that was met before; None where it was not."""
        if id(value) in self._met:
            return "again", self._met[id(value)]
        self._met[id(value)] = len(self._met)
        self._alive.append(value)
        return None

    def _stays_itself(self, value: Any) -> bool:
        """Whether code that reaches ``value`` is told apart by its identity alone."""
        if is_value(value) or isinstance(value, (types.FunctionType, types.MethodType, type)):
            return False
        kind = type(value)
        if self._parts > _MOST_OF_CODE or isinstance(value, (Tensor, nn.Module)):
            return True
        if isinstance(value, (list, dict, set, tuple, frozenset, deque)):
            return self._parts + len(value) > _MOST_OF_CODE
        unseen = any(hasattr(kind, name) for name in _ARRAYS) or _is_memory(value)
        return unseen or _root(kind) in _LIBRARIES

    @contextmanager
    def _of_code(self) -> Iterator[None]:
        self._in_code += 1
        try:
            yield
        finally:
            self._in_code -= 1

    def _code(self, value: Any, where: str) -> tuple[Hashable, ...]:
        """Itself, and what a function, a method or a class reads."""
        with self._of_code():
            if isinstance(value, types.MethodType):
                return self.of(value.__func__, where), self.of(value.__self__, where)
            if isinstance(value, type):
                return value, self._values_of_class(value)
            again = self._again(value)
            if again is not None or _root(value) in _LIBRARIES or self._parts > _MOST_OF_CODE:
                return (value,)
            cells = [content(cell) for cell in value.__closure__ or ()]
            names = [n for n in dict.fromkeys(named_in(value.__code__)) if n in value.__globals__]
            reads = (
                [cell for cell in cells if cell is not NOTHING],
                [value.__globals__[name] for name in names],
                [value.__defaults__, value.__kwdefaults__, vars(value)],
            )
            return value, *(tuple(self.of(held, where) for held in group) for group in reads)

    def _values_of_class(self, kind: type) -> tuple[Hashable, ...]:
        """Numbers, containers and the like that stand in a class of a user, and its functions."""
        found: list[Hashable] = []
        with self._of_code():
            for cls in kind.__mro__:
                if _root(cls) in _LIBRARIES or cls is object:
                    continue
                for name, held in list(vars(cls).items()):
                    if name.startswith("__") and not isinstance(held, types.FunctionType):
                        continue
                    if is_value(held) or isinstance(held, (list, dict, set, tuple, deque)):
                        found.append((cls, name, self.of(held, name)))
                    elif isinstance(held, types.FunctionType):
                        found.append((cls, name, held))
        return tuple(found)

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


def is_value(value: Any) -> bool:
    """A number, a string or the like: what it means can never change."""
    if isinstance(value, np.generic):
        return value.dtype.kind != "O"
    return isinstance(value, (float, complex, *_PLAIN)) and not isinstance(value, type)


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


def _root(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _named(kind: type) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"
