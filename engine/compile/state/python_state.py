"""What a model's forward may read beside the tensors it is given, as a picture to compare with.

A graph, a packed network and a recorded step keep whatever was decided from Python state when they
were made: the scale of an adapter, which one is active, a padding mode, a method put over another.
`PythonState` is a picture of all of that (`Reach` says what it is), which is compared with the
model in microseconds. Numbers and the like are compared by value, containers by their entries,
arrays and tensors by identity and by some of their content, everything else by identity.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from stepfuse.engine.compile.state.code import NOTHING, content
from stepfuse.engine.compile.state.reach import HOOKS, MACHINERY, PLAIN, Reach
from stepfuse.engine.compile.weights.watched import probe
from stepfuse.kernels.torch_names import FakeTensor, pytree

_MUTABLE = (Tensor, np.ndarray, dict, list, deque, set)
_EVERYWHERE = ("_global_forward_hooks", "_global_forward_pre_hooks")
_SAMPLE = 4096  # numbers of an array that are looked at


class PythonState:
    """The Python state that code reached from ``roots``, objects by name, may read.

    Attributes of modules and objects count where such code names them; all of them where it makes
    up names while it runs (getattr). ``reach`` is what was come to.

    Args:
        training: whether the flag ``training`` of modules counts.
        contents: whether tensors that are no weights of ``roots`` count by their values; by
            identity otherwise.
        weights: whether parameters and buffers of ``roots`` count, by identity. Where not, those
            do that were None, and the second places of shared ones.
        ignored: paths, as `changes` names them, that do not count; hooks of a module are at
            ``._forward_hooks`` and ``._forward_pre_hooks``.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        *,
        training: bool = True,
        contents: bool = True,
        weights: bool = True,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        reach = Reach(roots, ignored)
        if not reach.is_dynamic:
            reach = Reach(roots, ignored, frozenset(reach.named) | {"training"})
        self.reach = reach
        self._places: list[tuple[str, Any, tuple[Any, ...]]] = []  # path, mapping, its names
        self._takes: list[tuple[Callable[[Any], Any], Any]] = []
        self._values: list[Any] = []  # what stands there
        self._same: list[tuple[str, Any, Any, Any]] = []  # path, mapping, name, object
        self._ordered: list[tuple[str, Any]] = []
        self._sized: list[dict[str, Any]] = []
        self._sized_at: list[str] = []
        self._tables: list[tuple[str, dict[str, Any]]] = []  # of weights
        self._met: set[int] = set()  # weights that stand in one place already
        self._tensors: list[tuple[str, Callable[[], Any], Any]] = []
        mine = {id(m) for root in roots.values() if isinstance(root, nn.Module) for m in _all(root)}
        for path, module in reach.modules:
            self._take_module(path, module, training, weights or id(module) not in mine)
        for path, obj, held in reach.attributes:
            if not isinstance(obj, nn.Module):
                self._take(path, held, [n for n in held if reach.follows(path, n)])
        for path, held in reach.dicts:
            self._keyed(path, held)
        self._ordered += reach.sequences
        for name in _EVERYWHERE:
            self._keyed(name, getattr(module_globals, name))
        for where, _, space, names in reach.spaces.values():
            self._take(where, space, sorted(names))
        self._slots = [(p, o, n, getattr(o, n, NOTHING)) for p, o, n in reach.slots]
        self._cells = [(path, cell, content(cell)) for path, cell in reach.cells]
        self._arrays = [(path, array, _sample(array)) for path, array in reach.arrays]
        if contents:
            outside = [(f"{p}.{n}", t) for p, m in reach.modules if id(m) not in mine
                       for n, t in (*m._parameters.items(), *m._buffers.items())
                       if t is not None]  # fmt: skip
            for path, tensor in (*reach.tensors, *outside):
                if type(tensor) in (Tensor, nn.Parameter):
                    look = _looking_at(tensor)
                    self._tensors.append((path, look, look()))
        self._kinds = [type(obj) for _, obj, _ in reach.attributes]
        self._objects = [obj for _, obj, _ in reach.attributes]
        self._sizes = [len(held) for _, _, held in reach.attributes]
        self._dicts = [held for _, _, held in reach.attributes]
        self._known = [frozenset(held) for held in self._dicts]
        self._spaces = [place[:3] for place in reach.spaces.values()]
        self._hidden = [len(space) for *_, space in self._spaces]
        self._there = [frozenset(space) for *_, space in self._spaces]
        self._lengths = [len(table) for table in self._sized]
        self._orders = [_listed(held) for _, held in self._ordered]
        self._only_ordered = [held for _, held in self._ordered]
        self._weights = [[*map(id, table.values())] for _, table in self._tables]
        self._held = [list(table.values()) for _, table in self._tables]  # so that ids stay theirs
        self._cached = [cached.cache_info().currsize for cached in reach.caches]

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        try:
            return (
                [take(held) for take, held in self._takes] == self._values
                and [*map(type, self._objects)] == self._kinds
                and ([*map(len, self._dicts)] == self._sizes or self._none_came())
                and [[*map(id, table.values())] for _, table in self._tables] == self._weights
                and [*map(_listed, self._only_ordered)] == self._orders
                and [*map(len, self._sized)] == self._lengths
                and ([len(s) for *_, s in self._spaces] == self._hidden or self._none_came())
                and all(held[name] is value for _, held, name, value in self._same)
                and all(content(cell) is value for _, cell, value in self._cells)
                and all(getattr(obj, name, NOTHING) is v for _, obj, name, v in self._slots)
                and all(look() == before for _, look, before in self._tensors)
                and all(_sample(array) == held for _, array, held in self._arrays)
            )
        except Exception:  # a name that is gone, a comparison that fails: not what it was
            return False

    def changes(self) -> Iterator[str]:
        """The path of everything that is not as it was."""
        for (path, held, names), before in zip(self._places, self._values, strict=True):
            olds = before if len(names) > 1 else (before,)
            for name, old in zip(names, olds, strict=True):
                if not _equal(_entry(held, name), old):
                    yield f"{path}.{name}"
        for path, held, name, value in self._same:
            if _entry(held, name) is not value:
                yield f"{path}.{name}"
        for (path, obj, _), kind in zip(self.reach.attributes, self._kinds, strict=True):
            if type(obj) is not kind:
                yield f"{path}.__class__"
        yield from self._new_attributes()
        yield from self._hiding()
        for path, table, length in zip(self._sized_at, self._sized, self._lengths, strict=True):
            if len(table) != length:
                yield path
        for (path, held), before in zip(self._ordered, self._orders, strict=True):
            now = _listed(held)
            if not isinstance(held, dict):
                if not _equal(now, before):
                    yield path
            elif now != before:
                new = [f"{path}.{key}" for key in now if key not in before]
                yield from new or [path]
        for (path, table), before in zip(self._tables, self._held, strict=True):
            now = list(table.values())
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                yield path
        yield from (path for path, cell, value in self._cells if content(cell) is not value)
        for path, obj, name, value in self._slots:
            if getattr(obj, name, NOTHING) is not value:
                yield f"{path}.{name}"
        yield from (path for path, look, before in self._tensors if look() != before)
        yield from (path for path, array, held in self._arrays if _sample(array) != held)

    def has_fakes(self) -> bool:
        """Whether tensors without data are among what can be reached."""
        weights = [t for _, m in self.reach.modules for t in (*m._parameters.values(),)]
        return any(
            isinstance(t, FakeTensor) for t in (*weights, *dict(self.reach.tensors).values())
        )

    def forget_fakes(self) -> None:
        """Put back what was there where a tensor without data is now, and empty grown caches.

        For objects that a trace could reach although it ran on a mirror: through globals, caches of
        functions, slots, classes. Whatever else was changed stays as it is.
        """
        owners = {id(space): owner for _, owner, space in self._spaces}
        stood = [(held, n, old) for _, held, n, old in self._same]
        for (_, held, names), before in zip(self._places, self._values, strict=True):
            olds = before if len(names) > 1 else (before,)
            stood += [(held, name, old) for name, old in zip(names, olds, strict=True)]
        for held, name, old in stood:
            now = _entry(held, name)
            if now is not old and holds_fake(now):
                _put(owners.get(id(held), held), name, old)
        for (_, held), before in zip(self._ordered, self._orders, strict=True):
            _without_fakes(held, before)
        for held, known in zip(self._dicts, self._known, strict=True):
            for name in [n for n, v in dict(held).items() if n not in known and holds_fake(v)]:
                del held[name]
        for (_, owner, space), known in zip(self._spaces, self._there, strict=True):
            for name in [n for n, v in dict(space).items() if n not in known and holds_fake(v)]:
                _put(owner, name, NOTHING)
        for _, cell, value in self._cells:
            if holds_fake(content(cell)):
                cell.cell_contents = value
        for _, obj, name, value in self._slots:
            if holds_fake(getattr(obj, name, None)):
                object.__setattr__(obj, name, value)
        for cached, size in zip(self.reach.caches, self._cached, strict=True):
            if cached.cache_info().currsize > size:
                cached.cache_clear()

    def _take_module(self, path: str, module: nn.Module, training: bool, weights: bool) -> None:
        reach, held = self.reach, object.__getattribute__(module, "__dict__")
        for name in ("_modules", *HOOKS):
            if name in held and f"{path}.{name}" not in reach.ignored:
                if held[name]:
                    self._keyed(path, held[name])
                else:
                    self._size(path, held[name])
        for name in ("_parameters", "_buffers"):
            table = held.get(name, {})
            if weights:
                self._tables.append((path, table))
                continue
            self._size(path, table)
            for n, tensor in table.items():
                if tensor is None or id(tensor) in self._met:
                    self._same.append((path, table, n, tensor))
                self._met.add(id(tensor))
        made = {  # by torch.nn.utils, anew at every call
            hook.name
            for hook in held.get("_forward_pre_hooks", {}).values()
            if type(hook).__module__.startswith("torch.nn.utils.") and hasattr(hook, "name")
        }
        own = [n for n in held if n not in MACHINERY and n not in made and reach.follows(path, n)]
        own += ["training"] if training and "training" in held else []
        self._take(path, held, own)

    def _size(self, path: str, held: dict[str, Any]) -> None:
        """The picture of a table whose length says enough."""
        self._sized.append(held)
        self._sized_at.append(path)

    def _keyed(self, path: str, held: dict[Any, Any]) -> None:
        """The picture of a dict: its entries, and their order."""
        self._ordered.append((path, held))
        self._take(path, held, list(held))

    def _take(self, path: str, held: Any, names: list[Any]) -> None:
        valued = []
        for name in names:
            value = held[name]
            if isinstance(value, _MUTABLE) or not _compares(value):
                self._same.append((path, held, name, value))
            else:
                valued.append(name)
        if valued:
            take = operator.itemgetter(*valued)
            self._places.append((path, held, tuple(valued)))
            self._takes.append((take, held))
            self._values.append(take(held))

    def _none_came(self) -> bool:
        """Whether no name came that counts; the lengths that were found are the known ones then."""
        if any(self._new_attributes()) or any(self._hiding()):
            return False
        self._sizes = [*map(len, self._dicts)]
        self._hidden = [len(space) for *_, space in self._spaces]
        return True

    def _new_attributes(self) -> Iterator[str]:
        """Attributes that came, as far as they count; one may hide that of a class."""
        for (path, _, held), known in zip(self.reach.attributes, self._known, strict=True):
            for name in held.keys() - known:
                if self.reach.follows(path, name):
                    yield f"{path}.{name}"

    def _hiding(self) -> Iterator[str]:
        """Names that code looks up and that came to a class or a file since."""
        for (where, _, space), known in zip(self._spaces, self._there, strict=True):
            yield from (f"{where}.{n}" for n in self.reach.named if n in space and n not in known)


def _all(root: nn.Module) -> list[nn.Module]:
    """Registered modules, those that are shared in each place of theirs."""
    try:
        return list(root.modules())
    except Exception:
        return [root]


def holds_fake(value: Any) -> bool:
    """Whether a tensor without data, or a container of one, is there."""
    leaves = pytree.tree_leaves(value) if isinstance(value, (dict, list, tuple, set)) else [value]
    return any(isinstance(leaf, FakeTensor) for leaf in leaves)


def _entry(held: Any, name: Any) -> Any:
    try:
        return held[name]
    except (LookupError, TypeError):
        return NOTHING


def _put(owner: Any, name: Any, value: Any) -> None:
    """Set or (`NOTHING`) remove an entry of a dict or an attribute of a class."""
    if isinstance(owner, dict):
        if value is NOTHING:
            del owner[name]
        else:
            owner[name] = value
    elif value is NOTHING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _without_fakes(held: Any, before: Any) -> None:
    if isinstance(held, dict):
        for key in [k for k, v in dict(held).items() if k not in before and holds_fake(v)]:
            del held[key]
    elif isinstance(held, (list, deque)) and any(holds_fake(value) for value in tuple(held)):
        held.clear()
        held.extend(before)


def _compares(value: Any) -> bool:
    """Whether == of such values means what it says, and costs next to nothing."""
    kind: Any = type(value)
    return isinstance(value, (*PLAIN, tuple, type)) or kind.__eq__ is object.__eq__


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:
        return False


def _listed(held: Any) -> Any:
    """The entries of a container, the keys of a dict, in its order if it has one."""
    if isinstance(held, dict):
        return tuple(dict.keys(held))
    return frozenset(held) if isinstance(held, set) else tuple(held)


def _looking_at(tensor: Tensor) -> Callable[[], Any]:
    """What to call for something that changes when the tensor is written to."""
    counted = not tensor.is_inference()
    if tensor.layout is not torch.strided or tensor.is_nested:
        return lambda: tensor._version if counted else 0
    address, bits = tensor.data_ptr(), probe(tensor)

    def look() -> Any:
        if tensor.data_ptr() != address:
            return None
        return tensor._version if counted else 0, bits[0]

    return look


def _sample(array: Any) -> Any:
    """The content of an array; of a large one, numbers all over it."""
    flat = np.ravel(array)
    few = flat[:: max(1, flat.size // _SAMPLE)]
    return tuple(few) if array.dtype == object else few.tobytes()
