"""From a model and its arguments to something that runs, whatever fails on the way.

trace ──► every pass ──► run once           a pass that raises, or whose work does not run,
  │           │             │               is left out and named; the others stay
  │           └──◄── again ─┘
  └──► no graph ──► its modules with fused norms ──► the model itself
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from stepfuse.engine.compile.graph import PassReport
from stepfuse.engine.compile.network import PASSES, Network, PassFailed
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.state.random_sources import RandomSources
from stepfuse.engine.compile.tracing.quiet import quietly
from stepfuse.engine.compile.tracing.trace import CannotTrace
from stepfuse.engine.compile.weights.released import WeightsReleased
from stepfuse.engine.compile.weights.watched import Holding
from stepfuse.engine.compile.without_graph import WithoutGraph
from stepfuse.engine.replay.workspace import Workspace
from stepfuse.engine.replay.writer import maker

Compiled = Network | WithoutGraph


@dataclass(frozen=True)
class Settings:
    """How networks are compiled; see `stepfuse.optimize`."""

    dtype: torch.dtype | None = None
    without: Collection[str] = ()
    weights: Holding = "kept"


def compiled(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    workspace: Workspace,
) -> Compiled:
    """``model`` for arguments like these, run once where they have values.

    Random numbers may be drawn.

    Raises what the model itself raises for these arguments, and nothing else.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    left_out: dict[str, str] = {}
    try:
        with quietly():
            network = _network(model, args, kwargs, settings, workspace, left_out, leaves)
    except CannotTrace as why:
        if why.alone:
            dtype, reason = settings.dtype, str(why)
            return WithoutGraph(model, args, kwargs, dtype, reason, True, why.written)
        return without_graph(model, args, kwargs, settings, leaves, str(why))
    except PassFailed as why:
        return without_graph(model, args, kwargs, settings, leaves, str(why))
    for name, reason in left_out.items():
        network.reports.append(PassReport(name, note=f"left out: {reason}"))
    return network


def _network(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    workspace: Workspace,
    left_out: dict[str, str],
    leaves: Sequence[Any],
) -> Network:
    """One that runs; ``left_out`` gets the passes that had to go, each with the reason."""
    careful = False  # to find out which pass it was
    while True:
        reports: list[PassReport] = []
        try:
            without = {*settings.without, *left_out}
            network = Network(
                model, args, kwargs, settings.dtype, without, settings.weights, workspace, careful
            )
            reports = network.reports
            _try(network, leaves)
            return network
        except (CannotTrace, WeightsReleased):
            raise
        except PassFailed as failure:
            name, reason = failure.name, str(failure)
        except Exception as error:  # of an operator that cannot do this, or that this machine lacks
            if settings.weights == "released":
                raise  # there is nothing left to compile from
            if not careful and not maker(error):
                careful = True
                continue
            name, reason = maker(error), str(PassFailed("", error))
            name = name or _suspect(reports, settings, left_out)
        if not name or name in left_out:
            raise PassFailed("", RuntimeError(reason))
        left_out[name] = reason


def _suspect(reports: Sequence[PassReport], settings: Settings, gone: dict[str, str]) -> str:
    """What to leave out where an operator of the model fails that no pass has written."""
    if settings.dtype is not None and "lower_precision" not in gone:
        return "lower_precision"
    used = [r.name for r in reports if r.matched] or list(PASSES)
    return next((name for name in reversed(used) if name not in gone), "")


def _try(network: Network, leaves: Sequence[Any]) -> None:
    """Run once, where the arguments have values."""
    if have_values(leaves):
        network(leaves)


def have_values(leaves: Sequence[Any]) -> bool:
    """Whether every tensor among them has data."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)


def without_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
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
        return WithoutGraph(model, args, kwargs, settings.dtype, reason, alone=True)
    network = WithoutGraph(model, args, kwargs, settings.dtype, reason)
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
