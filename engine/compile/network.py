"""A network for one set of shapes: traced, rewritten, and compiled to three functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from stepfuse.engine.compile.graph import PassReport, fake_mode, finish, stage, value
from stepfuse.engine.compile.heap import trim
from stepfuse.engine.compile.passes.attention import attention
from stepfuse.engine.compile.passes.channels_last import channels_last
from stepfuse.engine.compile.passes.concatenate import concatenate
from stepfuse.engine.compile.passes.convolution_forms import convolution_forms
from stepfuse.engine.compile.passes.fold_group_norm import fold_group_norm
from stepfuse.engine.compile.passes.fuse_group_norm_silu import fuse_group_norm_silu
from stepfuse.engine.compile.passes.fuse_residual_add import fuse_residual_add
from stepfuse.engine.compile.passes.gather_attention import gather_attention
from stepfuse.engine.compile.passes.hoist_timestep import hoist_timestep, time_frontier
from stepfuse.engine.compile.passes.lower_precision import lower_precision
from stepfuse.engine.compile.passes.merge_linears import merge_linears
from stepfuse.engine.compile.passes.prepack_convolutions import prepack_convolutions
from stepfuse.engine.compile.passes.read_side_by_side import read_side_by_side
from stepfuse.engine.compile.passes.remove_no_ops import remove_no_ops
from stepfuse.engine.compile.passes.upsampled_convolutions import upsampled_convolutions
from stepfuse.engine.compile.passes.widen_conv1d import widen_conv1d
from stepfuse.engine.compile.precision_trial import pays
from stepfuse.engine.compile.stages import assign
from stepfuse.engine.compile.stopwatch import reading
from stepfuse.engine.compile.timetable import TimeTable
from stepfuse.engine.compile.tracing.trace import Traced, trace
from stepfuse.engine.compile.weights.watched import Holding, Weights
from stepfuse.engine.replay.emit import emit
from stepfuse.engine.replay.workspace import Workspace

PASSES = (
    "remove_no_ops",
    "widen_conv1d",
    "gather_attention",
    "fuse_group_norm_silu",
    "hoist_timestep",
    "merge_linears",
    "channels_last",  # before operators are asked in which dtypes they run: layouts matter
    "lower_precision",
    "concatenate",
    "attention",
    "upsampled_convolutions",
    "convolution_forms",
    "fold_group_norm",
    "read_side_by_side",
    "prepack_convolutions",
    "fuse_residual_add",
)


class PassFailed(RuntimeError):
    """What a pass made of the graph cannot run; ``name`` is the pass, "" where it is not known."""

    def __init__(self, name: str, error: BaseException) -> None:
        text = str(error).strip().partition("\n")[0]
        super().__init__(f"{type(error).__name__}: {text}")
        self.name = name


def rewrite(
    traced: Traced,
    dtype: torch.dtype | None,
    without: Collection[str],
    plain: bool = False,
    careful: bool = False,
) -> list[PassReport]:
    """Apply the passes in order, all but ``without``; the graph is changed in place.

    With ``plain`` constants take no more memory than the weights they are made of. With ``careful``
    the graph is run on tensors without data after every pass.

    Raises `PassFailed` where a pass raises, or leaves what does not run if that is looked for.
    """
    gm = traced.gm
    passes = {
        "remove_no_ops": remove_no_ops,
        "widen_conv1d": widen_conv1d,
        "gather_attention": gather_attention,
        "fuse_group_norm_silu": fuse_group_norm_silu,
        "hoist_timestep": lambda gm: hoist_timestep(gm, traced.time),
        "merge_linears": merge_linears,
        "channels_last": channels_last,
        "concatenate": concatenate,
        "attention": attention,
        "upsampled_convolutions": lambda gm: upsampled_convolutions(gm, plain),
        "convolution_forms": lambda gm: convolution_forms(gm, plain),
        "fold_group_norm": fold_group_norm,
        "read_side_by_side": read_side_by_side,
        "prepack_convolutions": prepack_convolutions,
        "fuse_residual_add": fuse_residual_add,
    }
    if dtype is not None:
        passes["lower_precision"] = lambda gm: lower_precision(gm, dtype, pays)
    assign(gm)
    expected = _results(gm)
    # an operator may not know its own result
    watched = careful and check(gm, "", expected) is None
    reports = []
    for name in PASSES:
        if name in passes and name not in without:
            known = set(gm.graph.nodes)
            try:
                reports.append(passes[name](gm))
                assign(gm)
            except Exception as error:
                raise PassFailed(name, error) from error
            for node in gm.graph.nodes:
                if node not in known:
                    node.meta["made_by"] = name
            if watched and (failure := check(gm, name, expected)) is not None:
                raise failure
    gm.graph.lint()
    return reports


def check(gm: GraphModule, name: str, expected: Any = None) -> PassFailed | None:
    """What goes wrong where the graph runs on the tensors without data that stand for its values;
    None where nothing does and its results are ``expected``.
    """
    held: dict[Node, Any] = {}
    mode = next((m for n in gm.graph.nodes if (m := fake_mode(n.meta.get("val")))), None)
    with torch.no_grad(), mode or contextlib.nullcontext():
        for node in gm.graph.nodes:
            if node.op != "call_function" or stage(node) == "weights":
                held[node] = node.meta.get("val")
                continue
            try:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
                held[node] = node.target(*args, **kwargs)
            except Exception as error:
                return PassFailed(name, error)
    made = [held[node] for node in gm.graph.output_node().all_input_nodes]
    now = [(tuple(v.shape), v.dtype) for v in made if isinstance(v, Tensor)]
    if expected is not None and now != expected:
        return PassFailed(name, ValueError(f"results are {now}, not {expected}"))
    return None


def _results(gm: GraphModule) -> list[Any]:
    """Shapes and dtypes of what the graph returns."""
    made = [node.meta.get("val") for node in gm.graph.output_node().all_input_nodes]
    return [(tuple(v.shape), v.dtype) for v in made if isinstance(v, Tensor)]


class Network:
    """``model`` for the shapes of (args, kwargs); call it with the leaves of such arguments.

    constant_i = fold_i(weights)                when built, and by ``refresh``, one by one
    e_1 .. e_k = time_stage(t)                  per evaluation, or a row of ``table``
    results = main(leaves, e_1 .. e_k)          per evaluation
    """

    alone = False  # it takes the model's place

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype | None,
        without: Collection[str],
        holding: Holding = "kept",
        workspace: Workspace | None = None,
        careful: bool = False,
    ) -> None:
        self._workspace = workspace or Workspace()
        traced = trace(model, args, kwargs)
        with reading([*model.parameters(), *model.buffers()]):
            self.reports = rewrite(traced, dtype, without, holding != "kept", careful)
        finish(traced.gm)
        self.out_spec = traced.out_spec
        self.written = traced.written
        self._traced_constants = traced.constants
        self._compile(traced, model, holding)
        del traced
        trim()
        self._bind_weights()
        trim()

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run; ``leaves`` are those of the (args, kwargs) it was built for, in order."""
        if torch._C._len_torch_dispatch_stack():
            results = self._results(leaves)  # whoever records wants to see every view as a view
        else:
            # nothing here has a gradient: operators need not ask for one
            with torch._C._AutoDispatchBelowAutograd():
                results = self._results(leaves)
        return pytree.tree_unflatten(results, self.out_spec)

    def _results(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        if self._time is None:
            return self._main(*leaves)
        return self._main(*leaves, *self._embedding(leaves[self._time]))

    def prepare(self, timesteps: Iterable[int]) -> None:
        """Fill the table for these timesteps; nothing to do without one."""
        if self.table is not None and self.table.integral:
            self.table.prepare(timesteps)
            self._rest()

    def refresh(self) -> None:
        """Read the weights again and recompute constants and rows, in place where possible."""
        self._bind_weights()
        if self.table is not None:
            self.table.refill()
            self._rest()

    def _rest(self) -> None:
        self.weights.leave_again(self._placeholders[name] for name in self._resting)

    def nbytes(self) -> int:
        """Bytes of the constants and of the table, beside the weights themselves."""
        held = [self._bound[fold.name] for fold in self._folds]
        table = 0 if self.table is None else self.table.nbytes()
        return table + sum(v.numel() * v.element_size() for v in held if isinstance(v, Tensor))

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
                if torch._C._len_torch_dispatch_stack():
                    # being recorded: what is recorded now would be replayed for other timesteps too
                    raise IndexError(
                        f"a timestep is not among the {len(table.filled)} announced ones, which a "
                        "recorded step reads from a table; call prepare(timesteps)"
                    ) from error
        return self._time_stage(t)

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
        self._resting = [
            node.name
            for node in nodes
            if holding == "parked"
            and node.name in self._direct
            and node.meta["weight"] not in traced.constants
            and all(stage(u) == "time" for u in node.users)
        ]
        named = [t for t in self._placeholders.values() if t not in traced.constants]
        self.weights = Weights(model, dict.fromkeys(named), holding)
        stages = {s: [n for n in nodes if n.op == "call_function" and stage(n) == s] for s in _ALL}
        folded = [n for n in stages["weights"] if any(stage(u) != "weights" for u in n.users)]
        # the globals of all functions: every name they read must be there when they are made
        names = [*self._placeholders, *(n.name for n in folded)]
        self._bound: dict[str, Any] = dict.fromkeys(names)
        self._folds = [_fold(node, stages["weights"], self._bound) for node in folded]

        frontier = time_frontier(traced.gm)
        self._time, self.table = None, None
        if frontier and traced.time is not None:
            self._time = traced.inputs.index(traced.time)
            self._time_stage = emit(stages["time"], [traced.time], frontier, self._bound)
            shapes = [value(n).shape for n in frontier]
            self.table = TimeTable(self._time_stage, value(traced.time), shapes)
        output = traced.gm.graph.output_node()
        results = pytree.tree_leaves(output.args[0], is_leaf=lambda v: isinstance(v, Node))
        self._main = emit(
            stages["main"], [*traced.inputs, *frontier], results, self._bound, self._workspace
        )

    @torch.no_grad()
    def _bind_weights(self) -> None:
        """Compute the constants, one after the other: what one needs on the way is dropped first.

        A weight that only constants are made of leaves memory after the last of them, unless all
        are kept; those that rest may leave at once.
        """
        current = self.weights.read() | self._traced_constants
        for name, target in self._placeholders.items():
            self._bound[name] = current[target]
        owned = {_memory(tensor) for tensor in current.values()}
        del current
        # what a constant needs on the way grows with it: the largest come last, when most is freed
        size = {
            fold.name: sum(self._bound[name].nbytes for name in fold.reads) for fold in self._folds
        }
        folds = sorted(self._folds, key=lambda fold: size[fold.name])
        kept = self.weights.holding == "kept"
        last = {} if kept else {name: fold for fold in folds for name in fold.reads}
        leaving = [name for name in last if name not in self._direct]
        done = 0
        targets = [self._placeholders[name] for name in (*self._resting, *leaving)]
        with self.weights.leaving(targets) as leave:
            for name in self._resting:
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

    def _bind_constant(self, fold: _Fold, owned: set[int | None]) -> None:
        """Compute one; ``owned`` is the memory of weights, which are not ours to write to."""
        (new,) = fold.run()
        old = self._bound[fold.name]
        if old is not None and _alike(old, new):
            old.copy_(new)  # a recorded step holds the tensor itself
        else:
            # constants are copies: those of the next refresh are written over them
            self._bound[fold.name] = new.clone() if _memory(new) in owned else new


_TRIM_EVERY = 1 << 19  # bytes of weights read or freed; half a millisecond each time
_ALL = ("weights", "time", "main")


@dataclass(frozen=True)
class _Fold:
    """How a constant is computed, and the placeholders of the weights it is made of."""

    name: str
    run: Callable[[], tuple[Any, ...]]
    reads: tuple[str, ...]


def _fold(node: Node, weights: list[Node], bound: dict[str, Any]) -> _Fold:
    needed, stack = set(), [node]
    while stack:
        one = stack.pop()
        if one not in needed:
            needed.add(one)
            stack += one.all_input_nodes
    run = emit([n for n in weights if n in needed], [], [node], bound)
    reads = tuple(n.name for n in needed if n.op == "placeholder")
    return _Fold(node.name, run, reads)


def _memory(tensor: Tensor) -> int | None:
    """The identity of a tensor's memory; None for packed weights, which own theirs."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _alike(old: Tensor, new: Tensor) -> bool:
    return (old.shape, old.dtype, old.layout, old.device) == (
        new.shape,
        new.dtype,
        new.layout,
        new.device,
    )


def _is_read(gm: GraphModule, name: str) -> bool:
    return any(n.name == name and n.users for n in gm.graph.nodes)
