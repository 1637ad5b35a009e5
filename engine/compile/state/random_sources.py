"""Where a forward may get numbers from that are others at every call.

A graph keeps the numbers that were drawn while it was traced. PyTorch's own are drawn by operators
of the graph, anew at every call; those of Python and NumPy, and what an iterator hands out, are
not.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from stepfuse.engine.compile.state.code import content
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.kernels.torch_names import disable_current_modes

_NUMPYS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_Source = tuple[str, Callable[[], Any], Callable[[Any], Any]]  # name, its state, to set it


class RandomSources:
    """The generators of random numbers that what ``state`` has met may draw from, as they are now.

    Those of Python and NumPy for everybody are among them. ``iterators`` names the kinds of those
    of the model's own: nobody can tell where they are, or set them back.
    """

    def __init__(self, state: PythonState) -> None:
        met = list(_met(state))
        self.iterators = sorted({_named(obj) for obj in _own(state) if _is_iterator(obj)})
        sources: list[_Source] = [
            ("random", random.getstate, random.setstate),
            ("numpy.random", *_of_numpy(np.random.mtrand._rand)[1:]),
            *(
                _of_python(obj)
                for obj in met
                if isinstance(obj, random.Random) and not _is_iterator(obj)
            ),
            *(_of_numpy(obj) for obj in met if isinstance(obj, _NUMPYS)),
        ]
        self._drawn = [(source, source[1]()) for source in sources]
        self._torch = [obj for obj in met if isinstance(obj, torch.Generator)]
        self._torch.append(torch.default_generator)
        with disable_current_modes():  # the states are tensors
            self._before = [generator.get_state() for generator in self._torch]

    def drawn(self) -> frozenset[str]:
        """Those of Python and NumPy that have given numbers since."""
        return frozenset(
            f"the random numbers of {name}"
            for (name, look, _), before in self._drawn
            if not _same(look(), before)
        )

    def put_back(self) -> None:
        """Let all give the same numbers once more."""
        for (_, look, put), before in self._drawn:
            if not _same(look(), before):
                put(before)
        with disable_current_modes():
            for generator, before in zip(self._torch, self._before, strict=True):
                if not torch.equal(generator.get_state(), before):
                    generator.set_state(before)


@contextlib.contextmanager
def undrawn(state: PythonState) -> Iterator[None]:
    """On leaving, the generators that ``state`` has met, and those for everybody, are put back."""
    sources = RandomSources(state)
    try:
        yield
    finally:
        sources.put_back()


def _met(state: PythonState) -> Iterator[Any]:
    """Objects that were visited, and those whose built-in methods are attributes."""
    reach = state.reach
    methods = (value for _, _, held in reach.attributes for value in list(held.values()))
    owners = (getattr(m, "__self__", None) for m in methods if callable(m))
    known: set[int] = set()
    for obj in (*reach.objects, *owners):
        if id(obj) not in known and isinstance(obj, _KINDS):
            known.add(id(obj))
            yield obj


def _own(state: PythonState) -> Iterator[Any]:
    """What hangs on the roots, and globals that are named in the files of their modules' classes.

    Other files have iterators for purposes of their own.
    """
    reach = state.reach
    files = {type(module).__module__ for _, module in reach.modules}
    roots = {path.partition(".")[0] for path, _ in reach.modules[:1]}
    for path, _, held in reach.attributes:
        if path.partition(".")[0] in roots:
            yield from list(held.values())
    for path, cell in reach.cells:
        if path.partition(".")[0] in roots:
            yield content(cell)
    for where, _, space, names in reach.spaces.values():
        if where in files:
            yield from (space[name] for name in names if name in space)


def _of_python(source: random.Random) -> _Source:
    return _named(source), source.getstate, source.setstate


def _of_numpy(source: Any) -> _Source:
    if isinstance(source, np.random.RandomState):
        return _named(source), lambda: source.get_state(legacy=False), source.set_state
    bits = source.bit_generator if isinstance(source, np.random.Generator) else source

    def put(state: Any) -> None:
        bits.state = state

    return _named(source), lambda: bits.state, put


def _is_iterator(obj: Any) -> bool:
    """What hands out one thing after the other, and cannot be set back."""
    kind = type(obj)
    return isinstance(obj, random.SystemRandom) or (
        kind.__module__ in ("builtins", "itertools") and hasattr(kind, "__next__")
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two states of one generator are equal, arrays in them included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


def _named(obj: Any) -> str:
    return f"a {type(obj).__module__}.{type(obj).__qualname__}".replace("a builtins.", "a ")


_KINDS = (random.Random, torch.Generator, *_NUMPYS)
