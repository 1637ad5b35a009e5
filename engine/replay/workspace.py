"""Results of a straight line of calls in one memory, planned before it runs.

    time    one after the other    planned
     0      v0                     v0
     1      v0 v1                  v0 v1
     2         v1 v2               v2 v1
     3            v2 v3            v2 v3

A heap hands out whatever hole fits best, so that over an evaluation results touch several times the
memory that is ever alive at once, and large ones are mapped anew each time, page by page. Here each
gets a place that no other needs while it lives: the largest first, as low as possible. A view lives
in what it is a view of. What leaves the line gets memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels import torch_names

_LINE = 64  # bytes of a cache line
_SILENT = ("aten::_unsafe_view", "aten::lift_fresh")  # views whose schema does not say so


@dataclass(frozen=True)
class Call:
    """One call of the line: what it makes, what it reads, and whether it may return (a view of) it.

    ``like`` is a tensor as its result will be, where the operator can be told to put it somewhere.
    """

    makes: Sequence[str]
    reads: Sequence[str]
    aliases: bool
    like: Tensor | None = None


def may_alias(target: Any) -> bool:
    """Whether a call of this operator may return one of its arguments, or a view of one."""
    if not isinstance(target, torch_names.OpOverload):
        return True
    name: Any = target.name  # untyped
    if name() in _SILENT or any(made.alias_info is not None for made in target._schema.returns):
        return True
    # what is made of other operators may do nothing at all
    return torch_names.has_kernel(name(), "CompositeImplicitAutograd")


class MemoryPlan:
    """Which results of a line lie where; ``kept`` are the names that leave it."""

    def __init__(self, calls: Sequence[Call], kept: Collection[str] = ()) -> None:
        within: dict[str, set[str]] = {}  # what a name may be, or be a view of
        likes: dict[str, Tensor] = {}
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, call in enumerate(calls):
            read = {held for name in call.reads for held in within.get(name, ())}
            last.update(dict.fromkeys(read, i))
            within.update({name: read if call.aliases else set() for name in call.makes})
            if call.like is not None:
                (name,) = call.makes
                likes[name], first[name], last[name], within[name] = call.like, i, i, {name}
        leaving = {held for name in kept for held in within.get(name, ())}
        spans = {n: (first[n], last[n], _size(likes[n])) for n in likes if n not in leaving}
        places = _places(spans)
        self.bytes = max((places[n] + spans[n][2] for n in places), default=0)
        self.index = {name: i for i, name in enumerate(places)}
        self._layouts = [
            (slice(places[n], places[n] + spans[n][2]), likes[n].dtype, likes[n].shape,
             likes[n].stride())
            for n in places
        ]  # fmt: skip

    def tensors(self, memory: Tensor) -> list[Tensor]:
        """The results, by ``index``, as tensors in ``memory`` of at least ``bytes``."""
        return [
            memory[part].view(dtype).as_strided(shape, stride)
            for part, dtype, shape, stride in self._layouts
        ]


def _size(like: Tensor) -> int:
    return -(-like.nbytes // _LINE) * _LINE


def _places(spans: dict[str, tuple[int, int, int]]) -> dict[str, int]:
    """Offsets for (first, last, bytes): the lowest that is free all the time, the largest first."""
    places: dict[str, int] = {}
    for name in sorted(spans, key=lambda n: (-spans[n][2], spans[n][0])):
        first, last, size = spans[name]
        others = [n for n in places if spans[n][0] <= last and first <= spans[n][1]]
        offset = 0
        for start, end in sorted((places[n], places[n] + spans[n][2]) for n in others):
            if offset + size <= start:
                break
            offset = max(offset, end)
        places[name] = offset
    return places


class Piece:
    """Memory, and the results that the plan which used it last has there."""

    def __init__(self, size: int) -> None:
        with torch.inference_mode(False):  # to be written to outside of it too
            self.memory = torch.empty(size, dtype=torch.uint8)
        self._plan: MemoryPlan | None = None
        self.places: list[Tensor] = []

    def lend(self, plan: MemoryPlan) -> None:
        """Let ``places`` be those of ``plan``."""
        if self._plan is not plan:
            with torch.inference_mode(False):
                self._plan, self.places = plan, plan.tensors(self.memory)


class Workspace:
    """Memory for evaluations: a piece for each that is under way, kept in ``free`` for the next."""

    def __init__(self) -> None:
        self.free: list[Piece] = []

    def take(self, plan: MemoryPlan) -> Piece:
        """One that is large enough; one that is not is dropped."""
        piece = self.free.pop() if self.free else None
        if piece is None or len(piece.memory) < plan.bytes:
            piece = Piece(plan.bytes)
        piece.lend(plan)
        return piece

    def give(self, piece: Piece) -> None:
        """Let the next evaluation have it."""
        self.free.append(piece)

    def __getstate__(self) -> dict[str, Any]:
        return {"free": []}


class Planned:
    """``run(*arguments, places)`` as a function of its arguments, its results in a workspace."""

    def __init__(self, run: Callable[..., Any], plan: MemoryPlan, workspace: Workspace) -> None:
        self._run, self.plan, self._workspace = run, plan, workspace
        self._nowhere = [None] * len(plan.index)

    def __call__(self, *arguments: Any) -> Any:
        if torch_names.len_dispatch_stack():
            return self._run(*arguments, self._nowhere)  # whoever records wants results to be new
        piece = self._workspace.take(self.plan)
        try:
            return self._run(*arguments, piece.places)
        finally:
            self._workspace.give(piece)
