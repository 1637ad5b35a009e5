"""From a model and its arguments to something that runs, whatever fails on the way.

trace ──► every pass ──► run once           a pass that raises, or whose work does not run,
  │           │             │               is left out and named; the others stay
  │           └──◄── again ─┘
  └──► no graph ──► its modules with fused norms ──► the model itself
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stepfuse.engine.compile.calls import have_values
from stepfuse.engine.compile.graph import PassReport
from stepfuse.engine.compile.network import CompiledNetwork, Settings
from stepfuse.engine.compile.rewrite import PassFailed
from stepfuse.engine.compile.tracing.quiet import quietly
from stepfuse.engine.compile.tracing.trace import CannotTrace
from stepfuse.engine.compile.weights.released import WeightsReleased
from stepfuse.engine.compile.without_graph import WithoutGraph, without_graph
from stepfuse.engine.replay.workspace import Workspace
from stepfuse.engine.replay.writer import maker
from stepfuse.kernels.torch_names import pytree

Compiled = CompiledNetwork | WithoutGraph


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
        return without_graph(model, args, kwargs, settings.dtype, leaves, str(why))
    except PassFailed as why:
        return without_graph(model, args, kwargs, settings.dtype, leaves, str(why))
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
) -> CompiledNetwork:
    """One that runs; ``left_out`` gets the passes that had to go, each with the reason."""
    careful = False  # to find out which pass it was
    while True:
        reports: list[PassReport] = []
        network: CompiledNetwork | None = None
        try:
            network = CompiledNetwork(model, args, kwargs, settings, workspace, left_out, careful)
            reports = network.reports
            _try(network, leaves)
            done, network = network, None
            return done
        except (CannotTrace, WeightsReleased):
            raise
        except PassFailed as failure:
            if not careful:
                careful = True  # it may be what another one has left
                continue
            name, reason = failure.name, str(failure)
        except Exception as error:  # of an operator that cannot do this, or that this machine lacks
            if settings.weights == "released":
                raise  # there is nothing left to compile from
            if not careful and not maker(error):
                careful = True
                continue
            name, reason = maker(error), str(PassFailed("", error))
            name = name or _suspect(reports, settings, left_out)
        finally:
            if network is not None:
                network.discard()
        if not name or name in left_out:
            raise PassFailed("", RuntimeError(reason))
        left_out[name] = reason


def _suspect(reports: Sequence[PassReport], settings: Settings, gone: dict[str, str]) -> str:
    """What to leave out where an operator of the model fails that no pass has written."""
    names = [pass_.__name__ for pass_ in settings.passes]
    there = [name for name in names if name not in {*settings.without, *gone}]
    if settings.dtype is not None and "lower_precision" in there:
        return "lower_precision"
    used = [r.name for r in reports if r.matched] or there
    return next((name for name in reversed(used) if name not in gone), "")


def _try(network: CompiledNetwork, leaves: Sequence[Any]) -> None:
    """Run once, where the arguments have values."""
    if have_values(leaves):
        network(leaves)
