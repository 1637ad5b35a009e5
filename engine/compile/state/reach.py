"""What code may come to from some objects: everything that hangs on them, and what it names.

    attributes      of modules and of the user's own objects, slots too
    containers      dicts, lists, sets, tuples, by content
    code            bound methods, closures, defaults, attributes of functions
    names           globals, and attributes of classes and files, as far as code that was reached
                    names them; the names are found on the way, until no new ones come

Objects of the standard library, torch, NumPy and this package are not looked into, but for plain
containers of attributes such as ``argparse.Namespace``. Names lead into the packages that the
objects are of, and into code that is not installed as a package; other packages keep to themselves.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepfuse.engine.compile.state.code import NOTHING, content, functions, named_in, unwrapped

NUMBERS = (bool, int, float, complex, str, bytes, Enum, np.generic, type(None))
PLAIN = (
    *NUMBERS,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
MACHINERY = frozenset(vars(nn.Module()))
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "stepfuse", "pybind11_builtins"}
_MOST = 5000  # functions that are read; whoever has more may read any name
_CONTAINERS = (dict, list, tuple, set, Tensor, np.ndarray, functools._lru_cache_wrapper)
_WITH_ENTRIES = (dict, list, deque, set, tuple, frozenset)
_HOLDERS = (types.SimpleNamespace, argparse.Namespace, collections.UserDict, collections.UserList)
# code with one of these may read an attribute under a name that stands nowhere
_DYNAMIC = {"getattr", "__dict__", "vars", "attrgetter", "eval", "exec", "__getattribute__", "dir"}


class Reach:
    """The objects and names that can be come to from ``roots``, objects by name.

    Args:
        ignored: paths that are not followed.
        only: names of attributes to follow on modules and objects; None for all.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        ignored: frozenset[str] = frozenset(),
        only: frozenset[str] | None = None,
    ) -> None:
        self.ignored, self.only = ignored, only
        self.modules: list[tuple[str, nn.Module]] = []
        self.attributes: list[tuple[str, Any, dict[str, Any]]] = []  # path, of what, they
        self.slots: list[tuple[str, Any, str]] = []
        self.dicts: list[tuple[str, dict[Any, Any]]] = []
        self.sequences: list[tuple[str, Any]] = []
        self.tensors: list[tuple[str, Tensor]] = []
        self.arrays: list[tuple[str, Any]] = []
        self.cells: list[tuple[str, types.CellType]] = []
        self.caches: list[Any] = []  # of functools
        # id of a class or of the globals of a file -> its name, itself, its entries, names of it
        self.spaces: dict[int, tuple[str, Any, Any, set[str]]] = {}
        self.named = {"forward", "__call__"}
        self._owners: dict[type | types.ModuleType, int] = {}  # classes and files
        self._own: set[str] = set()  # packages that modules and objects of the model are of
        self._functions = 0
        self._seen: dict[int, Any] = {}  # held, so that no id is used twice
        self._todo: deque[tuple[Any, str]] = deque()
        for name, root in roots.items():
            self._add(root, name)
        while True:
            while self._todo:
                obj, path = self._todo.popleft()
                # what does not let itself be looked at counts by what it is
                with contextlib.suppress(Exception):
                    self._look(obj, path)
            if not self._follow_names():
                break

    @property
    def objects(self) -> list[Any]:
        """All that was visited."""
        return list(self._seen.values())

    @property
    def is_dynamic(self) -> bool:
        """Whether some code may read attributes by names that are made up at run time."""
        return self._functions >= _MOST or bool(self.named & _DYNAMIC)

    def follows(self, path: str, name: Any) -> bool:
        """Whether an attribute counts."""
        if self.ignored and f"{path}.{name}" in self.ignored:
            return False
        return self.only is None or name in self.only

    def _add(self, obj: Any, path: str) -> None:
        if not issubclass(type(obj), PLAIN) and id(obj) not in self._seen:
            self._todo.append((obj, path))

    def _look(self, obj: Any, path: str) -> None:
        if id(obj) in self._seen or path in self.ignored:
            return
        self._seen[id(obj)] = obj
        kind = type(obj)  # not isinstance: proxies pretend
        if issubclass(kind, nn.Module):
            self._look_at_module(obj, path)
        elif issubclass(kind, Tensor):
            self.tensors.append((path, obj))
        elif issubclass(kind, np.ndarray):
            self.arrays.append((path, obj))
        elif issubclass(kind, dict):
            self.dicts.append((path, obj))
            for key, value in list(dict.items(obj)):
                self._add(value, f"{path}.{key}")
        elif issubclass(kind, (list, deque, set)):
            self.sequences.append((path, obj))
            self._add_all(obj, path)
        elif issubclass(kind, (tuple, frozenset)):
            self._add_all(obj, path)
        elif kind is types.MethodType:
            self._add_all((obj.__self__, obj.__func__), path)
        elif issubclass(kind, functools.partial):
            self._add_all((obj.func, obj.args, obj.keywords), path)
        elif kind is types.FunctionType:
            self._look_at_function(obj, path)
        elif kind is functools._lru_cache_wrapper:
            self.caches.append(obj)
            self._add(obj.__wrapped__, path)
        elif kind is weakref.ref:
            self._add(obj(), path)
        elif issubclass(kind, (type, types.ModuleType)):
            self._meet(obj)
        elif is_a_users(kind):
            self._look_at_object(obj, path)
        if issubclass(kind, _WITH_ENTRIES) and is_a_users(kind):
            self._look_at_object(obj, path)  # attributes beside the entries

    def _add_all(self, objs: Iterable[Any], path: str) -> None:
        for i, value in enumerate(tuple(objs)):
            self._add(value, f"{path}[{i}]")

    def _look_at_module(self, module: nn.Module, path: str) -> None:
        instead = getattr(type(module), "watched_instead", None)
        if instead is not None:  # it has state of its own, which is not the model's
            for other in instead(module):
                self._look(other, path)
            return
        held = object.__getattribute__(module, "__dict__")
        if type(held.get("_modules")) not in (dict, collections.OrderedDict):
            return  # compiled by TorchScript, say: its state is not Python's
        self.modules.append((path, module))
        self._own.add(root_of(type(module)))
        self.attributes.append((path, module, held))
        for name, value in list(held.items()):
            if name not in MACHINERY and self.follows(path, name):
                self._add(value, f"{path}.{name}")
        for name in HOOKS:
            if f"{path}.{name}" not in self.ignored:
                self._add_all(held.get(name, {}).values(), f"{path} (hook)")
        for name, child in held.get("_modules", {}).items():
            self._add(child, f"{path}.{name}")
        self._meet(type(module))

    def _look_at_object(self, obj: Any, path: str) -> None:
        held = getattr(obj, "__dict__", None)
        self._own.add(root_of(type(obj)))
        if isinstance(held, dict) and isinstance(obj, _HOLDERS):
            self._add(held, path)  # read by keys, whatever names there are
        elif isinstance(held, dict):
            self.attributes.append((path, obj, held))
            for name, value in list(held.items()):
                if self.follows(path, name):
                    self._add(value, f"{path}.{name}")
        for cls in type(obj).__mro__:
            for name, member in list(vars(cls).items()):
                if isinstance(member, types.MemberDescriptorType) and self.follows(path, name):
                    self.slots.append((path, obj, name))
                    self._add(getattr(obj, name, None), f"{path}.{name}")
        self._meet(type(obj))

    def _look_at_function(self, function: types.FunctionType, path: str) -> None:
        if self._is_foreign(function) or self._functions >= _MOST:
            return
        self._functions += 1
        code = function.__code__
        self.named.update(named_in(code))
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            if name != "__class__":
                self.cells.append((f"{path}.{name}", cell))
                held = content(cell)
                if held is not NOTHING:
                    self._add(held, f"{path}.{name}")
        self._add_all((function.__defaults__, function.__kwdefaults__), path)
        if function.__dict__:
            self._add(function.__dict__, path)
        space = function.__globals__
        named = {n for n in named_in(code) if n in space and not n.startswith("__")}
        self._enter(space, space, function.__module__, named)

    def _enter(self, owner: Any, entries: Any, where: str, names: set[str]) -> None:
        """Names that code may read in a class or in the globals of a file."""
        _, _, space, known = self.spaces.setdefault(id(owner), (where, owner, entries, set()))
        for name in names - known:
            known.add(name)
            value = space[name]
            for inner in unwrapped(value):
                named = isinstance(inner, (type, types.ModuleType, types.FunctionType))
                kind = inner if named else type(inner)
                met = isinstance(inner, _CONTAINERS) or not self._is_foreign(kind)
                # an object of the standard library or NumPy is met, and not looked into
                if met or (not named and root_of(kind) in _LIBRARIES):
                    self._add(inner, f"{where}.{name}")

    def _meet(self, owner: type | types.ModuleType) -> None:
        """A class or a file: what code names of it counts."""
        found = owner.__mro__ if isinstance(owner, type) else (owner,)
        for one in found:
            if one not in (object, nn.Module):
                self._owners.setdefault(one, 0)

    def _is_foreign(self, obj: Any) -> bool:
        """Whether a class, function or file is of a package that keeps to itself."""
        root = root_of(obj)
        return root in _LIBRARIES or (root not in self._own and _is_installed(root))

    def _follow_names(self) -> bool:
        """Look up the names that came since; False where nothing has."""
        new = False
        for owner, known in list(self._owners.items()):
            if known == len(self.named):
                continue
            new, self._owners[owner] = True, len(self.named)
            space = vars(owner)
            found = {n for n in self.named if n in space}
            if isinstance(owner, type):
                found = {n for n in found if not n.startswith("__") or n == "__call__"}
            if self._is_foreign(owner):
                # its own code is as it is, but it may call methods of a user's class
                if isinstance(owner, type) and issubclass(owner, nn.Module):
                    for name in found:
                        for function in functions(space[name]):
                            self.named.update(named_in(function.__code__))
                continue
            where = getattr(owner, "__qualname__", owner.__name__)
            self._enter(owner if isinstance(owner, type) else space, space, where, found)
        return new


@functools.cache
def _is_installed(root: str) -> bool:
    """Whether a package lies where pip puts them."""
    module = sys.modules.get(root)
    places = [str(getattr(module, "__file__", "")), *map(str, getattr(module, "__path__", ()))]
    return any("site-packages" in place or "dist-packages" in place for place in places)


def is_a_users(kind: type) -> bool:
    """Whether objects of this class are looked into; settings of ours are."""
    root = root_of(kind)
    if root not in _LIBRARIES:
        return True
    return issubclass(kind, _HOLDERS) or (root == "stepfuse" and dataclasses.is_dataclass(kind))


def root_of(obj: Any) -> str:
    """The package that a class, function or file is of."""
    name = obj.__name__ if isinstance(obj, types.ModuleType) else getattr(obj, "__module__", "")
    return str(name).partition(".")[0]
