"""A second tree of modules that shares every tensor with the first, and nothing else.

A forward that is traced does what it likes with the modules it belongs to: it sets attributes,
fills dicts and lists, and tracers put tensors without data where the weights are. On a mirror all
of that happens to objects that nobody else knows.

    module, dict, list, set, object      a new one with the same content, mirrored
    bound method, partial, closure       the same code on mirrored objects
    tensor, number, string, class        itself

What is shared inside the tree is shared in the mirror: two names of one module, a dict that several
modules write to. Classes with ``__slots__`` and objects that refuse to be copied (locks, files)
stay themselves.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from collections import deque
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from stepfuse.engine.compile.state.code import NOTHING
from stepfuse.engine.compile.state.code import content as held_by
from stepfuse.engine.compile.state.reach import is_a_users, root_of

T = TypeVar("T")
_LARGEST = 200_000  # objects; a trainer with its data set hangs on the model then


class CannotMirror(RuntimeError):
    """The module holds something that a second tree cannot stand for; the message says what."""


def mirrored(root: T) -> T:
    """The mirror of an object, usually a module.

    Raises `CannotMirror` for scripted modules and parameters that have no shape yet.
    """
    try:
        found: T = Mirror().of(root)
    except CannotMirror:
        raise
    except Exception as error:  # of the user's classes, or of a chain that is too long
        raise CannotMirror(f"{type(error).__name__}: {error}") from error
    return found


class Mirror:
    """Objects and what stands for them; one mirror gives each object one twin."""

    def __init__(self) -> None:
        self._twins: dict[int, Any] = {}
        self._held: list[Any] = []  # an id is good as long as its object lives

    def of(self, obj: Any) -> Any:
        """What stands for ``obj``."""
        if isinstance(obj, _THEMSELVES) or obj is None:
            return obj
        known = self._twins.get(id(obj), self)
        if known is not self:
            return known
        if len(self._twins) > _LARGEST:
            raise CannotMirror(f"it holds more than {_LARGEST:,} objects")
        self._held.append(obj)
        return self._made(obj)

    def _made(self, obj: Any) -> Any:
        if issubclass(type(obj), nn.Module):  # a proxy pretends
            return self._module(obj)
        if isinstance(obj, torch.Tensor):
            if isinstance(obj, UninitializedTensorMixin):
                raise CannotMirror("a parameter has no shape before the first call")
            return self._is(obj, obj)
        if isinstance(obj, dict):
            return self._dict(obj)
        if isinstance(obj, (list, deque)):
            return self._list(obj)
        if isinstance(obj, (tuple, frozenset)):
            return self._frozen(obj)
        if isinstance(obj, set):
            return self._is(obj, _rebuilt(type(obj), [self.of(v) for v in obj], obj))
        if isinstance(obj, types.MethodType):
            return self._is(obj, types.MethodType(self.of(obj.__func__), self.of(obj.__self__)))
        if isinstance(obj, functools.partial):
            return self._partial(obj)
        if isinstance(obj, types.FunctionType):
            return self._function(obj)
        if type(obj) is weakref.ref:
            target = obj()
            return self._is(obj, obj if target is None else weakref.ref(self.of(target)))
        return self._object(obj)

    def _is(self, obj: Any, twin: Any) -> Any:
        self._twins[id(obj)] = twin
        self._held.append(twin)  # what a weak reference is to find must live as long
        return twin

    def _module(self, module: nn.Module) -> Any:
        if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise CannotMirror(f"{type(module).__name__} is compiled by TorchScript")
        twin = self._is(module, object.__new__(type(module)))
        held = object.__getattribute__(module, "__dict__")
        mine = object.__getattribute__(twin, "__dict__")
        for name, value in dict(held).items():
            mine[name] = self.of(value)
        return twin

    def _dict(self, obj: dict[Any, Any]) -> Any:
        twin = self._is(obj, {} if type(obj) is dict else _copied(obj))
        if twin is obj:
            return obj
        content = dict(obj)  # another thread may write to it meanwhile
        dict.clear(twin)
        for key, value in content.items():
            dict.__setitem__(twin, self.of(key), self.of(value))
        return twin

    def _list(self, obj: Any) -> Any:
        twin = self._is(obj, [] if type(obj) is list else _copied(obj))
        if twin is not obj:
            kind: Any = list if isinstance(obj, list) else deque
            content = [self.of(value) for value in kind.__iter__(obj)]
            kind.clear(twin)
            kind.extend(twin, content)
        return twin

    def _frozen(self, obj: Any) -> Any:
        content = [self.of(value) for value in obj]
        if all(a is b for a, b in zip(content, obj, strict=True)):
            return self._is(obj, obj)
        return self._is(obj, _rebuilt(type(obj), content, obj))

    def _partial(self, obj: functools.partial[Any]) -> Any:
        args, keywords = self.of(obj.args), self.of(obj.keywords)
        return self._is(obj, functools.partial(self.of(obj.func), *args, **keywords))

    def _function(self, obj: types.FunctionType) -> Any:
        if not (obj.__closure__ or obj.__defaults__ or obj.__kwdefaults__):
            return self._is(obj, obj)
        cells = tuple(self._cell(cell) for cell in obj.__closure__ or ())
        twin = types.FunctionType(obj.__code__, obj.__globals__, obj.__name__, None, cells)
        self._is(obj, twin)
        twin.__defaults__, twin.__kwdefaults__ = (
            self.of(obj.__defaults__),
            self.of(obj.__kwdefaults__),
        )
        twin.__dict__.update(obj.__dict__)
        twin.__qualname__, twin.__module__ = obj.__qualname__, obj.__module__
        for cell, mine in zip(obj.__closure__ or (), cells, strict=True):
            if held_by(cell) is not NOTHING and held_by(mine) is NOTHING:
                mine.cell_contents = self.of(cell.cell_contents)
        return twin

    def _cell(self, cell: types.CellType) -> types.CellType:
        """An empty one: it is filled when the function it belongs to is known."""
        if id(cell) not in self._twins:
            self._held.append(cell)
            self._twins[id(cell)] = types.CellType()
        found: types.CellType = self._twins[id(cell)]
        return found

    def _object(self, obj: Any) -> Any:
        if root_of(type(obj)) in sys.stdlib_module_names and not is_a_users(type(obj)):
            return self._is(obj, obj)  # locks, events, loggers: others wait for that very object
        if not _has_attributes(obj):
            return self._is(obj, obj)
        twin = self._is(obj, _copied(obj))
        if twin is not obj and type(twin) is type(obj):
            mine = object.__getattribute__(twin, "__dict__")
            for name, value in dict(mine).items():
                mine[name] = self.of(value)
        return twin


def _has_attributes(obj: Any) -> bool:
    try:
        return isinstance(object.__getattribute__(obj, "__dict__"), dict)
    except Exception:
        return False


def _rebuilt(kind: Any, content: list[Any], obj: Any) -> Any:
    """The same container of other entries, or the object itself where its class refuses."""
    try:
        return kind(*content) if hasattr(obj, "_fields") else kind(content)
    except Exception:
        return obj


def _copied(obj: Any) -> Any:
    """A shallow copy, or the object itself where it refuses; what it runs is the user's code."""
    try:
        return copy.copy(obj)
    except Exception:
        return obj


_THEMSELVES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.CodeType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    torch.Generator,
    torch.jit.ScriptFunction,
)
