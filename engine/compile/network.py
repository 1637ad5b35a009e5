"""A network for one set of shapes: traced, rewritten, and compiled to three functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.effects import effect
from stepfuse.engine.compile.graph import (
    Pass,
    PassContext,
    PassReport,
    aten,
    finish,
    is_call,
    stage,
    value,
)
from stepfuse.engine.compile.graph_text import graph_text
from stepfuse.engine.compile.heap import trim
from stepfuse.engine.compile.pass_order import PASSES
from stepfuse.engine.compile.precision_trial import pays
from stepfuse.engine.compile.rewrite import rewrite
from stepfuse.engine.compile.stages import STAGES, Stage, time_frontier
from stepfuse.engine.compile.stopwatch import reading
from stepfuse.engine.compile.timetable import TimeTable
from stepfuse.engine.compile.tracing.trace import Traced, trace
from stepfuse.engine.compile.weights.parked import home
from stepfuse.engine.compile.weights.watched import Holding, Weights
from stepfuse.engine.replay.emit import emit
from stepfuse.engine.replay.workspace import Workspace
from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import FakeTensor, pytree


@dataclass(frozen=True)
class Settings:
    """How networks are compiled; see `stepfuse.optimize`."""

    dtype: torch.dtype | None = None
    passes: tuple[Pass, ...] = PASSES
    without: tuple[str, ...] = ()
    weights: Holding = "kept"
    has_timestep: bool = True


class CompiledNetwork:
    """``model`` for the shapes of (args, kwargs); call it with the leaves of such arguments.

    constant_i = fold_i(weights)                when built, and by ``refresh``, one by one
    e_1 .. e_k = time_stage(t)                  per evaluation, or a row of ``table``
    results = main(leaves, e_1 .. e_k)          per evaluation

    ``effect`` says what another evaluation would do beside that, "" where nothing.
    """

    alone = False  # it takes the model's place

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: Settings,
        workspace: Workspace | None = None,
        left_out: Collection[str] = (),
        careful: bool = False,
    ) -> None:
        self.workspace = workspace or Workspace()
        traced = trace(model, args, kwargs, settings.has_timestep)
        with reading([*model.parameters(), *model.buffers()]):
            self.reports = _rewritten(traced, settings, left_out, careful)
        self.out_spec = traced.out_spec
        self.written = traced.written
        self._moves = 0
        self.turned: dict[str, int] = {}  # constants that are weights themselves, and their bytes
        self.left: dict[str, int] = {}  # why others are copies, and how many
        self._traced_constants = traced.constants
        self._compile(traced, model, settings.weights)
        del traced
        trim()
        try:
            self._bind_weights()
        except BaseException:
            self.discard()
            raise
        trim()

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run; ``leaves`` are those of the (args, kwargs) it was built for, in order."""
        if torch_names.len_dispatch_stack():
            results = self._results(leaves)  # whoever records wants to see every view as a view
        else:
            # nothing here has a gradient: operators need not ask for one
            with torch_names.below_autograd():
                results = self._results(leaves)
        return pytree.tree_unflatten(results, self.out_spec)

    def _results(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        if self._time is None:
            return self.main(*leaves)
        return self.main(*leaves, *self._embedding(leaves[self._time]))

    def prepare(self, timesteps: Iterable[int]) -> None:
        """Fill the table for these timesteps; nothing to do without one."""
        if self.table is not None and self.table.integral:
            self.table.prepare(timesteps)
            self._evict()

    def refresh(self) -> None:
        """Read the weights again and recompute constants and rows, in place where possible."""
        self._bind_weights()
        if self.table is not None:
            self.table.refill()
            self._evict()

    def _evict(self) -> None:
        self.weights.evict(self._placeholders[name] for name in self._time_only_weights)

    @property
    def moves(self) -> int:
        """How often something that a recorded step reads was put elsewhere: the table, constants,
        weights that are read as they are.
        """
        return self._moves + (0 if self.table is None else self.table.moves)

    def discard(self) -> None:
        """Leave the weights as they were; this network cannot run any more."""
        for name in self._bound:
            if isinstance(self._bound[name], Tensor):
                self._bound[name] = None
        turned = [fold.reads[0] for fold in self.folds if fold.name in self.turned]
        self.weights.turn_back(self._placeholders[name] for name in turned)

    def nbytes(self) -> int:
        """Bytes of the constants and of the table, beside the weights themselves."""
        table = 0 if self.table is None else self.table.nbytes()
        held = [v for name, v in self.constants.items() if name not in self.turned]
        return table + sum(v.numel() * v.element_size() for v in held if isinstance(v, Tensor))

    @property
    def constants(self) -> dict[str, Any]:
        """What was computed from weights alone, by the name of its node."""
        return {fold.name: self._bound[fold.name] for fold in self.folds}

    @property
    def unwatched(self) -> list[Tensor]:
        """Tensors of the model that it reads and that are none of its parameters and buffers."""
        return [v for v in self._traced_constants.values() if v.layout is torch.strided]

    def listed(self, stage: Stage) -> str:
        """The calls of one stage, a line each."""
        return self._texts[stage]

    def changed(self) -> str | None:
        """The name of a weight that was changed since it was read, or None."""
        return self.weights.changed()

    def _embedding(self, t: Tensor) -> tuple[Any, ...]:
        table = self.table
        assert table is not None
        if table.table is not None:
            if t.device.type != "cpu":
                return table.lookup(t)
            try:
                return table.lookup(t)
            except IndexError as error:
                if torch_names.len_dispatch_stack():
                    # being recorded: what is recorded now would be replayed for other timesteps too
                    raise IndexError(
                        f"a timestep is not among the {len(table.filled)} announced ones, which a "
                        "recorded step reads from a table; call prepare(timesteps)"
                    ) from error
        return self.time_stage(t)

    def _compile(self, traced: Traced, model: nn.Module, holding: Holding) -> None:
        nodes = list(traced.gm.graph.nodes)
        placeholders = {n.name: n.meta["weight"] for n in nodes if "weight" in n.meta}
        self._placeholders = {
            name: target for name, target in placeholders.items() if _is_read(traced.gm, name)
        }
        # read as they are, or no weights of the model: they stay
        self._direct = {
            node.name
            for node in nodes
            if "weight" in node.meta
            and (
                node.meta["weight"] in traced.constants
                or any(stage(u) != "weights" for u in node.users)
            )
        }
        # only a timestep without a row in the table asks for them
        self._time_only_weights = [
            node.name
            for node in nodes
            if holding == "parked"
            and node.name in self._direct
            and node.meta["weight"] not in traced.constants
            and all(stage(u) == "time" for u in node.users)
        ]
        named = [t for t in self._placeholders.values() if t not in traced.constants]
        self.weights = Weights(model, dict.fromkeys(named), holding)
        called = [n for n in nodes if n.op == "call_function"]
        self.effect = effect(called)
        stages = {s: [n for n in called if stage(n) == s] for s in STAGES}
        folded = [n for n in stages["weights"] if any(stage(u) != "weights" for u in n.users)]
        # the globals of all functions: every name they read must be there when they are made
        names = [*self._placeholders, *(n.name for n in folded)]
        self._bound: dict[str, Any] = dict.fromkeys(names)
        self.folds = [_fold(node, stages["weights"], self._bound) for node in folded]

        frontier = time_frontier(traced.gm)
        output = traced.gm.graph.output_node()
        results = pytree.tree_leaves(output.args[0], is_leaf=lambda v: isinstance(v, Node))
        inputs, time = [*traced.inputs, *frontier], [traced.time] if traced.time else []
        self._texts: dict[Stage, str] = {
            "weights": graph_text("weights", stages["weights"], [], folded),
            "time": graph_text("time", stages["time"], time, frontier),
            "main": graph_text("main", stages["main"], inputs, results),
        }
        self._time, self.table = None, None
        if frontier and traced.time is not None:
            self._time = traced.inputs.index(traced.time)
            self.time_stage = emit(stages["time"], [traced.time], frontier, self._bound)
            shapes = [value(n).shape for n in frontier]
            self.table = TimeTable(self.time_stage, value(traced.time), shapes)
        self.main = emit(stages["main"], inputs, results, self._bound, self.workspace)

    @torch.no_grad()
    def _bind_weights(self) -> None:
        """Compute the constants, one after the other: what one needs on the way is dropped first.

        A weight that only constants are made of leaves memory after the last of them, unless all
        are kept; those that only the timestep asks for may leave at once.
        """
        current = self.weights.read() | self._traced_constants
        for name, target in self._placeholders.items():
            if name in self._direct:
                self._moves += _is_elsewhere(self._bound[name], current[target])
            self._bound[name] = current[target]
        del current
        self._turn_filters()
        owned = {_memory(self._bound[name]) for name in self._placeholders}
        # what a constant needs on the way grows with it: the largest come last, when most is freed
        size = {
            fold.name: sum(self._bound[name].nbytes for name in fold.reads) for fold in self.folds
        }
        folds = sorted(self.folds, key=lambda fold: size[fold.name])
        kept = self.weights.holding == "kept"
        last = {} if kept else {name: fold for fold in folds for name in fold.reads}
        leaving = [name for name in last if name not in self._direct]
        done = 0
        targets = [self._placeholders[name] for name in (*self._time_only_weights, *leaving)]
        with self.weights.leaving(targets) as leave:
            for name in self._time_only_weights:
                self._bound[name] = None
                self._bound[name] = leave(self._placeholders[name])
            trim()
            for fold in folds:
                self._bind_constant(fold, owned)
                done += size[fold.name] if kept else 0
                for name in fold.reads:
                    if last.get(name) is fold and name not in self._direct:
                        done += self._bound[name].nbytes
                        self._bound[name] = None
                        leave(self._placeholders[name])
                if done > _TRIM_EVERY:
                    done = 0
                    trim()

    def _turn_filters(self) -> None:
        """Let weights that are read in another layout lie in it, instead of having copies.

        On the CPU they are packed, which no layout of the weight replaces.
        """
        before, self.turned, self.left = self.turned, {}, {}
        for fold in self.folds if self.weights.holding == "parked" else ():
            if fold.layout is None:
                continue
            (name,) = fold.reads
            self._bound[name] = None
            weight, reason = self.weights.turn(self._placeholders[name], fold.layout)
            self._bound[name] = weight
            if reason:
                self.left[reason] = self.left.get(reason, 0) + 1
            else:
                self.turned[fold.name] = weight.nbytes
        for name in before.keys() - self.turned.keys():
            self._bound[name] = None  # it was the weight, and will be a copy
            self._moves += 1

    def _bind_constant(self, fold: Fold, owned: set[int | None]) -> None:
        """Compute one; ``owned`` is the memory of weights, which are not ours to write to."""
        (new,) = fold.run()
        old = self._bound[fold.name]
        if fold.name in self.turned:
            self._moves += _is_elsewhere(old, new)
            self._bound[fold.name] = new  # the weight itself
        elif old is not None and _alike(old, new) and _memory(old) not in owned:
            old.copy_(new)  # a recorded step holds the tensor itself
        else:
            self._moves += old is not None
            # constants are copies: those of the next refresh are written over them
            self._bound[fold.name] = new.clone() if _memory(new) in owned else new


_TRIM_EVERY = 1 << 19  # bytes of weights read or freed; half a millisecond each time


def _rewritten(
    traced: Traced, settings: Settings, left_out: Collection[str], careful: bool
) -> list[PassReport]:
    """What the passes did that are not left out; the graph is changed in place."""
    gone = {*settings.without, *left_out}
    passes = [pass_ for pass_ in settings.passes if pass_.__name__ not in gone]
    context = PassContext(traced.time, settings.dtype, settings.weights != "kept", pays)
    reports = rewrite(traced.gm, passes, context, careful)
    finish(traced.gm)
    return reports


@dataclass(frozen=True)
class Fold:
    """How a constant is computed, and the placeholders of the weights it is made of.

    ``layout`` is that in which it has the values of its weight, where it is that and no more.
    """

    name: str
    run: Callable[[], tuple[Any, ...]]
    reads: tuple[str, ...]
    layout: torch.memory_format | None = None


def _fold(node: Node, weights: list[Node], bound: dict[str, Any]) -> Fold:
    needed, stack = set(), [node]
    while stack:
        one = stack.pop()
        if one not in needed:
            needed.add(one)
            stack += one.all_input_nodes
    run = emit([n for n in weights if n in needed], [], [node], bound)
    reads = tuple(n.name for n in needed if n.op == "placeholder")
    return Fold(node.name, run, reads, _layout(node))


def _layout(node: Node) -> torch.memory_format | None:
    """The layout that a node asks of a weight, where it does nothing else."""
    (source,) = node.all_input_nodes if len(node.all_input_nodes) == 1 else (None,)
    asked = node.kwargs.get("memory_format")
    if source is None or source.op != "placeholder" or not is_call(node, aten.contiguous.default):
        return None
    return asked if isinstance(asked, torch.memory_format) else None


def _memory(tensor: Tensor) -> int | None:
    """The identity of a tensor's memory; None for packed weights, which own theirs."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _is_elsewhere(old: Tensor | None, new: Tensor) -> bool:
    """Whether a weight that was read as ``old`` lies in other memory now."""
    if old is None or isinstance(new, FakeTensor) or new.layout is not torch.strided:
        return False
    return home(old) != home(new)


def _alike(old: Tensor, new: Tensor) -> bool:
    return (old.shape, old.dtype, old.layout, old.device) == (
        new.shape,
        new.dtype,
        new.layout,
        new.device,
    )


def _is_read(gm: GraphModule, name: str) -> bool:
    return any(n.name == name and n.users for n in gm.graph.nodes)
