"""What runs where a module has no graph: its modules, with fused GroupNorms, or the module itself.

    Sequential(GroupNorm, SiLU) ──► Sequential(FusedGroupNorm with SiLU, Identity)
    GroupNorm                   ──► FusedGroupNorm

in a mirror of the module tree, which shares every parameter and buffer with the original. A forward
that writes to its module, or does what no mirror can do, runs on the original.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepfuse.engine.compile.calls import have_values
from stepfuse.engine.compile.graph import PassReport
from stepfuse.engine.compile.runs import has_instructions
from stepfuse.engine.compile.stages import Stage
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.state.random_sources import RandomSources
from stepfuse.engine.compile.tracing.mirror import CannotMirror, Mirror
from stepfuse.engine.compile.tracing.trace import evaluating
from stepfuse.engine.compile.tracing.undone import undone
from stepfuse.engine.compile.weights.watched import WeightGone
from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.torch_names import pytree


class FusedGroupNorm(nn.Module):
    """act(GroupNorm(x)), x [N, C, ...], with the parameters of another GroupNorm."""

    def __init__(self, norm: nn.GroupNorm, act: Literal["silu", "none"]) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.act = norm.num_groups, norm.eps, act

    def forward(self, x: Tensor) -> Tensor:
        """Result like x, in its dtype."""
        act: Literal["silu", "none"] = "silu" if self.act == "silu" else "none"
        return group_norm_silu(x, self.weight, self.bias, self.groups, self.eps, act=act)


class WithoutGraph:
    """``model`` for the shapes of (args, kwargs), with the interface of a `CompiledNetwork`.

    Parameters and buffers that were replaced in the original are taken over at the next call.

    Args:
        reason: why there is no graph.
        alone: nothing but the model itself may run.
        written: what its forward is known to write, as paths of `PythonState`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype | None,
        reason: str,
        alone: bool = False,
        written: frozenset[str] = frozenset(),
    ) -> None:
        self._source, self._dtype = model, dtype
        self.moves = 0  # nothing is read but what the original holds
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._twin: _Twin | None = None
        self.alone, self._passing = alone, False
        self.written = written
        self.reports = [PassReport("module replacement", note=f"no graph: {reason}")]
        if not alone:
            self._mirror()
        device = next((v.device for v in leaves if isinstance(v, Tensor)), None)
        if dtype is not None and device is not None and not has_instructions(device, dtype):
            self._stay_in_float32(f"no instructions for {dtype} on this CPU")

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run; ``leaves`` are those of the (args, kwargs) it was built for, in order."""
        return self._lowered(leaves, self._run)

    def try_out(self, leaves: Sequence[Any]) -> None:
        """Run the modules once, unless only the model itself may; it is not run here, and nothing
        that its operators write stays.
        """
        twin = self._twin
        if twin is not None:
            with self.undone(leaves):
                self._lowered(leaves, twin.module)
                self._watch(twin)

    def result(self, leaves: Sequence[Any]) -> Any:
        """What the modules compute in the model's own precision, as `try_out` runs them.

        Other leaves than it was built for will do, too. Not where only the model itself may run.
        """
        twin = self._twin
        assert twin is not None
        args, kwargs = pytree.tree_unflatten(list(leaves), self._spec)
        with self.undone(leaves):
            return twin.module(*args, **kwargs)

    def undone(self, leaves: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
        """Inside, what operators write to ``leaves`` and to tensors of the model is taken back."""
        held = [] if self._twin is None else self._twin.tensors
        return undone([*held, *(leaf for leaf in leaves if isinstance(leaf, Tensor))])

    def run_alone(self, why: str) -> None:
        """Let the model itself run from here on."""
        self._twin, self.alone = None, True
        report = self.reports[0]
        report.matched = report.candidates = 0
        report.note += f"; the model runs as it is: {why}"

    def remark(self, why: str, passing: bool = False) -> None:
        """Say more of why there is no graph; ``passing`` reasons hold until ``refresh``, which
        raises `WeightGone` then, for the model to be compiled again.
        """
        self.reports[0].note += f"; {why}"
        self._passing = self._passing or passing

    def prepare(self, timesteps: Iterable[int]) -> None:
        """There is no table."""

    def refresh(self) -> None:
        """Take over replaced parameters; changed ones are shared already."""
        if self._passing:
            raise WeightGone("the model is to be compiled again")
        if not self.alone:
            self._mirror()

    def listed(self, stage: Stage) -> str:
        """There are no stages."""
        return self.reports[0].note

    def nbytes(self) -> int:
        """Nothing is held beside the parameters of the original."""
        return 0

    def changed(self) -> None:
        """Parameters are those of the original, so that they never differ."""

    def _mirror(self) -> None:
        report = PassReport("module replacement", note=self.reports[0].note)
        mirror = _Mirror()
        try:
            module = mirror.of(self._source)
        except (CannotMirror, RecursionError) as error:
            self.run_alone(str(error))
            return
        module = evaluating(_with_fused_norms(module, report, {}))
        held = [t for m in mirror.modules for t in (m._parameters, m._buffers)]
        state = PythonState({"model": module})
        self._twin = _Twin(module, state, [(t, dict(t)) for t in held], mirror.tensors)
        self.reports = [report]

    def _lowered(self, leaves: Sequence[Any], run: Callable[..., Any]) -> Any:
        """``run`` under autocast, the result in the dtype of x, that of the weights where x has
        integers.
        """
        args, kwargs = pytree.tree_unflatten(list(leaves), self._spec)
        if self._dtype is None:
            return run(*args, **kwargs)
        x = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        try:
            with torch.autocast(x.device.type, self._dtype):
                result = run(*args, **kwargs)
        except Exception as error:  # a layer may lack any dtype, in any way
            result = run(*args, **kwargs)  # what is wrong without it too is the model's
            self._stay_in_float32(f"{type(error).__name__} in {self._dtype}")
            return result
        dtype = x.dtype if x.is_floating_point() else _dtype(self._source)
        return pytree.tree_map(
            lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v,
            result,
        )

    def _stay_in_float32(self, why: str) -> None:
        self._dtype = None
        self.reports[0].note += f"; the network runs in float32: {why}"

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._twin is not None and self._twin.is_outdated():
            self._mirror()
        twin = self._twin
        if twin is not None:
            result = twin.module(*args, **kwargs)
            if self._watch(twin):
                return result
        # what the forward writes belongs into the original
        with _evaluating(self._source):
            return self._source(*args, **kwargs)

    def _watch(self, twin: _Twin) -> bool:
        """Whether the forward has left its modules as they were; it goes back to them if not."""
        if twin.state.holds():
            return True
        self.written |= frozenset(twin.state.changes())
        self.run_alone(f"forward changes {min(self.written, default='the module')!r}")
        return False


def without_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype | None,
    leaves: Sequence[Any],
    reason: str,
) -> WithoutGraph:
    """The modules with fused norms, or the model itself where they fail.

    Tried out where the arguments have values, without a trace on them or the model. Raises the
    model's own error where it has one.
    """
    iterators = RandomSources(PythonState({"model": model}, training=False)).iterators
    if iterators:
        reason += f"; forward may read {', '.join(iterators)}, which nobody can set back"
        return WithoutGraph(model, args, kwargs, dtype, reason, alone=True)
    network = WithoutGraph(model, args, kwargs, dtype, reason)
    if not have_values(leaves):
        return network
    try:
        network.try_out(leaves)
    except Exception as error:
        try:
            with network.undone(leaves):
                model(*args, **kwargs)
        except Exception as own:
            raise own from None  # the model's own error, without what was tried
        network.run_alone(f"{type(error).__name__}: {error}")
    return network


def _dtype(model: nn.Module) -> torch.dtype:
    found = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return next(found, torch.get_default_dtype())


class _Mirror(Mirror):
    """One that remembers what it has met."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []

    def _made(self, obj: Any) -> Any:
        if isinstance(obj, nn.Module):
            self.modules.append(obj)
        elif isinstance(obj, Tensor):
            self.tensors.append(obj)
        return super()._made(obj)


@dataclass(frozen=True)
class _Twin:
    """A mirror of the modules.

    ``state`` is its own; ``tables`` are those of parameters and buffers of the original, each with
    what it held; ``tensors`` are all that the two share.
    """

    module: nn.Module
    state: PythonState
    tables: list[tuple[dict[str, Any], dict[str, Any]]]
    tensors: list[Tensor]

    def is_outdated(self) -> bool:
        """Whether a parameter or buffer of the original was replaced, added or removed."""
        return any(
            len(table) != len(held) or any(table.get(name, self) is not held[name] for name in held)
            for table, held in self.tables
        )


def _with_fused_norms(
    module: nn.Module, report: PassReport, done: dict[int, nn.Module]
) -> nn.Module:
    """``module`` with its GroupNorms exchanged, in place; each one once."""
    if id(module) in done:
        return done[id(module)]
    if type(module) is nn.GroupNorm and not _is_hooked(module):
        report.count()
        done[id(module)] = FusedGroupNorm(module, "none")
        return done[id(module)]
    done[id(module)] = module
    children = list(module._modules.items())
    for i, (name, child) in enumerate(children):
        if child is None:
            continue
        before = children[i - 1][1] if i else None
        after = children[i + 1][1] if i + 1 < len(children) else None
        plain = type(module) is nn.Sequential and not _is_hooked(child)
        if plain and type(child) is nn.GroupNorm and type(after) is nn.SiLU:
            report.count()
            module._modules[name] = FusedGroupNorm(child, "silu")
        elif plain and type(child) is nn.SiLU and type(before) is nn.GroupNorm:
            module._modules[name] = nn.Identity()
        else:
            module._modules[name] = _with_fused_norms(child, report, done)
    return module


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards back in its own."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
