"""What a model's forward may read beside tensors: numbers, flags, names, the modules themselves.

A graph, a packed network and a recorded step keep whatever was decided from such state when they
were made: the scale of an adapter, which one is active, a padding mode, a method put over another.
`PythonState` is a picture of it that can be compared with the model in microseconds:

    attributes of every module and object     values; containers also by content
    structure                                 which modules, how many parameters and hooks
    code                                      closures, defaults, and the globals, class attributes
                                              and methods that the forward's code names, all the way

Objects of the standard library, torch and NumPy are compared by identity, values by ==.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from stepfuse.engine.passes.code import NOTHING, content, functions, named_in
from stepfuse.engine.passes.weights import probe

_CONTAINERS = (dict, list, deque, set)
# whose attributes and code are nobody's to change while a model runs
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "stepfuse", "pybind11_builtins"}
# of every module: contents by size, attributes by what they hold
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TABLES = ("_parameters", "_buffers", *_HOOKS)
_MACHINERY = frozenset(vars(nn.Module()))


class PythonState:
    """The Python state that ``roots``, objects by name, may read; see the module's docstring.

    Args:
        training: whether the flag ``training`` of modules counts.
        contents: whether tensors that are no parameters or buffers count by their values; by
            identity otherwise.
        ignored: paths, as `changes` names them, that do not count; hooks of a module are at
            ``._forward_hooks`` and ``._forward_pre_hooks``.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        *,
        training: bool = True,
        contents: bool = True,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        self._training, self._contents, self._ignored = training, contents, ignored
        self._seen: dict[int, Any] = {}  # held, so that no id is used twice
        self._places: list[tuple[str, Any, tuple[Any, ...]]] = []  # path, mapping, its names
        self._values: list[Any] = []  # what stands there
        self._takes: list[tuple[Callable[[Any], Any], Any]] = []
        self._same: list[tuple[str, Any, Any, Any]] = []  # path, mapping, name, object
        self._sized: list[tuple[str, Any]] = []
        self._attributes: list[tuple[str, dict[str, Any], int, frozenset[str]]] = []
        self._lists: list[tuple[str, Any]] = []
        self._tensors: list[tuple[str, Callable[[], Any], Any]] = []
        self._arrays: list[tuple[str, Any, bytes]] = []
        self._cells: list[tuple[str, types.CellType, Any]] = []
        self._collections: list[tuple[dict[Any, Any], frozenset[Any]]] = []  # dicts of a file
        self._caches: list[tuple[Any, int]] = []  # functools.cache and how much it held
        self._named = {"forward", "__call__"}  # what code that may run reads by name
        self._classes: dict[type, set[str]] = {}  # and which names of each were looked at
        for name, root in roots.items():
            self._visit(root, name)
        self._visit_classes()
        # where names are ignored they may come and go; all others are counted at once
        owners = {path.rpartition(".")[0] for path in ignored}
        self._unsteady = [place for place in self._attributes if place[0] in owners]
        steady = [place[1] for place in self._attributes if place[0] not in owners]
        self._sized_only = [held for _, held in self._sized] + steady
        self._sizes = [*map(len, self._sized_only)]
        self._copies = [_listed(held) for _, held in self._lists]
        self._listed_only = [held for _, held in self._lists]

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        try:
            return (
                [take(held) for take, held in self._takes] == self._values
                and [*map(len, self._sized_only)] == self._sizes
                and all(self._count(held, path) == n for path, held, n, _ in self._unsteady)
                and [*map(_listed, self._listed_only)] == self._copies
                and all(held[name] is value for _, held, name, value in self._same)
                and all(content(cell) is value for _, cell, value in self._cells)
                and all(look() == before for _, look, before in self._tensors)
                and all(_bytes(array) == content for _, array, content in self._arrays)
            )
        except Exception:  # a name that is gone, a comparison that fails: not what it was
            return False

    def changes(self) -> Iterator[str]:
        """The path of everything that is not as it was."""
        for (path, held, names), before in zip(self._places, self._values, strict=True):
            olds = before if len(names) > 1 else (before,)
            for name, old in zip(names, olds, strict=True):
                if not _equal(held.get(name, NOTHING), old):
                    yield f"{path}.{name}"
        for (path, held), size in zip(self._sized, self._sizes, strict=False):
            if len(held) != size:
                yield path
        for path, held, _, known in self._attributes:
            new = [f"{path}.{name}" for name in held if name not in known]
            yield from (place for place in new if place not in self._ignored)
        for (path, held), copied in zip(self._lists, self._copies, strict=True):
            if not _equal(_listed(held), copied):
                yield path
        for path, held, name, value in self._same:
            try:
                if held[name] is value:
                    continue
            except (LookupError, TypeError):
                pass
            yield f"{path}.{name}"
        yield from (path for path, cell, value in self._cells if content(cell) is not value)
        yield from (path for path, look, before in self._tensors if look() != before)
        yield from (path for path, array, content in self._arrays if _bytes(array) != content)

    def forget_fakes(self) -> None:
        """Put back what was there where a tensor without data is now, and empty grown caches.

        For objects that a trace could reach although it ran on a mirror: through globals, caches of
        functions, closures of a library. Whatever else was changed stays as it is.
        """
        for (_, held, names), before in zip(self._places, self._values, strict=True):
            olds = before if len(names) > 1 else (before,)
            for name, old in zip(names, olds, strict=True):
                _put_back(held, name, old)
        for _, held, name, value in self._same:
            _put_back(held, name, value)
        for (_, held), copied in zip(self._lists, self._copies, strict=True):
            if isinstance(held, (list, deque)) and holds_fake(list(held)):
                held.clear()
                held.extend(copied)
        grown = [(held, names) for _, held, _, names in self._attributes]
        for collected, keys in grown + self._collections:
            for key in [k for k, v in dict(collected).items() if k not in keys and holds_fake(v)]:
                del collected[key]
        for _, cell, value in self._cells:
            if holds_fake(content(cell)):
                cell.cell_contents = value
        for cached, size in self._caches:
            if cached.cache_info().currsize > size:
                cached.cache_clear()

    def _visit(self, obj: Any, path: str) -> None:
        if obj is None or isinstance(obj, _PLAIN) or id(obj) in self._seen:
            return
        if path in self._ignored:
            return
        self._seen[id(obj)] = obj
        if isinstance(obj, nn.Module):
            self._visit_module(obj, path)
        elif isinstance(obj, Tensor):
            if self._contents and type(obj) in (Tensor, nn.Parameter):
                look = _looking_at(obj)
                self._tensors.append((path, look, look()))
        elif isinstance(obj, np.ndarray):
            self._arrays.append((path, obj, _bytes(obj)))
        elif isinstance(obj, dict):
            self._sized.append((path, obj))
            self._collections.append((obj, frozenset(obj)))
            self._visit_mapping(obj, path)
        elif isinstance(obj, (list, deque, set)):
            self._lists.append((path, obj))
            self._visit_all(obj, path)
        elif isinstance(obj, (tuple, frozenset)):
            self._visit_all(obj, path)
        elif isinstance(obj, types.MethodType):
            self._visit(obj.__self__, path)
            self._visit(obj.__func__, path)
        elif isinstance(obj, functools.partial):
            self._visit_all((obj.func, obj.args, obj.keywords), path)
        elif isinstance(obj, types.FunctionType):
            self._visit_function(obj, path)
        elif isinstance(obj, functools._lru_cache_wrapper):
            self._caches.append((obj, obj.cache_info().currsize))
            self._visit(getattr(obj, "__wrapped__", None), path)
        elif type(obj) is weakref.ref:
            self._visit(obj(), path)
        elif hasattr(obj, "__dict__") and _is_a_users(obj):
            self._count_attributes(vars(obj), path)
            self._visit_mapping(vars(obj), path)
            self._meet(type(obj))

    def _visit_all(self, objs: Any, path: str) -> None:
        for i, value in enumerate(list(objs)):
            self._visit(value, f"{path}[{i}]")

    def _visit_module(self, module: nn.Module, path: str) -> None:
        watched = getattr(type(module), "watched_instead", None)
        if watched is not None:  # it has state of its own, which is not the model's
            for other in watched(module):
                self._visit(other, path)
            return
        held = object.__getattribute__(module, "__dict__")
        tables = {n: held[n] for n in _TABLES if n in held and f"{path}.{n}" not in self._ignored}
        self._sized += [(f"{path}.{name}", table) for name, table in tables.items()]
        children = held.get("_modules", {})
        self._sized.append((path, children))
        self._watch(children, path, tuple(children))
        made = {  # by torch.nn.utils, anew at every call
            hook.name
            for hook in held.get("_forward_pre_hooks", {}).values()
            if type(hook).__module__.startswith("torch.nn.utils.") and hasattr(hook, "name")
        }
        names = [n for n in held if n not in _MACHINERY and n not in made]
        names += ["training"] if self._training else []
        self._count_attributes(held, path)
        self._visit_mapping(held, path, names)
        for name in _HOOKS:
            self._visit_all(tables.get(name, {}).values(), f"{path} (hook)")
        for name, child in children.items():
            self._visit(child, f"{path}.{name}")
        self._meet(type(module))

    def _count_attributes(self, held: dict[str, Any], path: str) -> None:
        self._attributes.append((path, held, self._count(held, path), frozenset(held)))

    def _count(self, held: dict[str, Any], path: str) -> int:
        if not self._ignored:
            return len(held)
        return sum(f"{path}.{name}" not in self._ignored for name in held)

    def _visit_mapping(self, held: Any, path: str, names: Any = None) -> None:
        named = [
            n for n in (held if names is None else names) if f"{path}.{n}" not in self._ignored
        ]
        valued = []
        for name in named:
            value = held[name]
            if isinstance(value, (Tensor, np.ndarray, *_CONTAINERS)) or not _compares(value):
                self._same.append((path, held, name, value))
            else:
                valued.append(name)
        self._watch(held, path, tuple(valued))
        for name in named:
            self._visit(held[name], f"{path}.{name}")

    def _watch(self, held: Any, path: str, names: tuple[Any, ...]) -> None:
        names = tuple(n for n in names if f"{path}.{n}" not in self._ignored)
        if names:
            take = operator.itemgetter(*names)
            self._places.append((path, held, names))
            self._takes.append((take, held))
            self._values.append(take(held))

    def _meet(self, kind: type) -> None:
        for cls in kind.__mro__:
            if cls not in (object, nn.Module):
                self._classes.setdefault(cls, set())

    def _visit_classes(self) -> None:
        """Attributes and methods that can be exchanged for all objects of a class, as far as code
        names them that the forward may come to; its names are found on the way.
        """
        before = -1
        while before != len(self._named) + len(self._classes):
            before = len(self._named) + len(self._classes)
            for cls, looked in list(self._classes.items()):
                own = vars(cls)
                names = [n for n in own if n in self._named and n not in looked]
                looked.update(names)
                if _root(cls) not in _LIBRARIES:
                    self._watch(own, cls.__qualname__, tuple(n for n in names if _compares(own[n])))
                for name in names:
                    for function in functions(own[name]):
                        self._named.update(named_in(function.__code__))
                        self._visit(function, f"{cls.__qualname__}.{name}")

    def _visit_function(self, function: types.FunctionType, path: str) -> None:
        if _root(function) in _LIBRARIES:
            return
        self._named.update(named_in(function.__code__))
        cells = function.__closure__ or ()
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
            if name != "__class__" and f"{path}.{name}" not in self._ignored:
                content = content(cell)
                self._cells.append((f"{path}.{name}", cell, content))
                self._visit(content, f"{path}.{name}")
        self._visit(function.__defaults__, path)
        self._visit(function.__kwdefaults__, path)
        self._visit_globals(function.__globals__, function.__module__, function.__code__)

    def _visit_globals(self, held: dict[str, Any], where: str, code: types.CodeType) -> None:
        """Plain values, functions, tensors and modules that the code names."""
        names = [n for n in dict.fromkeys(named_in(code)) if n in held]
        self._watch(
            held, where, tuple(n for n in names if isinstance(held[n], (*_NUMBERS, *_CALLED)))
        )
        for name in names:
            value = held[name]
            if isinstance(value, (nn.Module, *_CALLED)):
                self._visit(value, f"{where}.{name}")
            elif isinstance(value, Tensor):
                self._same.append((where, held, name, value))
                self._visit(value, f"{where}.{name}")
            elif isinstance(value, dict) and id(value) not in self._seen:
                # what a cache collects is no setting
                numbers = tuple(k for k, v in dict(value).items() if isinstance(v, _NUMBERS))
                self._watch(value, f"{where}.{name}", numbers)
                self._collections.append((value, frozenset(value)))


def holds_fake(value: Any) -> bool:
    """Whether a tensor without data, or a container of one, is there."""
    leaves = pytree.tree_leaves(value) if isinstance(value, (*_CONTAINERS, tuple)) else [value]
    return any(isinstance(leaf, FakeTensor) for leaf in leaves)


def _put_back(held: Any, name: Any, old: Any) -> None:
    now = held.get(name, old) if isinstance(held, (dict, types.MappingProxyType)) else old
    if now is not old and holds_fake(now):
        held[name] = old


def _compares(value: Any) -> bool:
    """Whether == of such values means what it says, and costs next to nothing."""
    kind: Any = type(value)
    return isinstance(value, _PLAIN) or kind.__eq__ is object.__eq__ or isinstance(value, tuple)


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:
        return False


def _listed(held: Any) -> Any:
    return frozenset(held) if isinstance(held, set) else tuple(held)


def _looking_at(tensor: Tensor) -> Callable[[], Any]:
    """What to call for something that changes when the tensor is written to."""
    if tensor.layout is not torch.strided:
        return lambda: None if tensor.is_inference() else tensor._version
    counted, address, bits = not tensor.is_inference(), tensor.data_ptr(), probe(tensor)

    def look() -> Any:
        if tensor.data_ptr() != address:
            return None
        return tensor._version if counted else 0, bits[0]

    return look


def _is_a_users(obj: Any) -> bool:
    """No object of a library, whose attributes are its own business; settings of ours count."""
    root = _root(type(obj))
    return root not in _LIBRARIES or (root == "stepfuse" and dataclasses.is_dataclass(obj))


def _bytes(array: Any) -> bytes:
    """The content of a small array; of a large one, its first elements."""
    found: bytes = np.ravel(array)[:4096].tobytes() if array.dtype != object else b""
    return found


def _root(obj: Any) -> str:
    return str(getattr(obj, "__module__", "")).partition(".")[0]


_CALLED = (types.FunctionType, functools._lru_cache_wrapper)
_NUMBERS = (bool, int, float, complex, str, bytes, Enum, np.generic)
_PLAIN = (
    *_NUMBERS,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)
