"""From a module to a graph: weights as named placeholders, nothing decomposed.

Recorded directly where that is possible (`direct_trace`), by torch.export otherwise; always on a
mirror of the module, so that whatever happens the module itself stays what it was. One trace runs
at a time in a process, and what tracers exchange for all threads is exchanged for one alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import is_tensor
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.state.random_sources import RandomSources
from stepfuse.engine.compile.tracing.direct_trace import ChangesItself, record, written_by
from stepfuse.engine.compile.tracing.mirror import CannotMirror, mirrored
from stepfuse.engine.compile.tracing.quiet import quietly
from stepfuse.engine.compile.tracing.this_thread import exporting_in_this_thread, in_this_thread
from stepfuse.engine.compile.tracing.undone import kept
from stepfuse.engine.compile.tracing.unnoticed import unnoticed
from stepfuse.kernels.torch_names import TreeSpec

one_at_a_time = threading.RLock()  # taken before the lock of an `Optimized`


class CannotTrace(RuntimeError):
    """The module has no graph; the message says why.

    ``alone`` is True where only the module itself does what its forward does: nothing may run in
    its place. ``written`` are the paths, as in `PythonState`, of what it writes then.
    """

    def __init__(
        self, reason: str, alone: bool = False, written: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(reason)
        self.alone, self.written = alone, written


@dataclass
class Traced:
    """A network as a graph.

    ``gm`` has one placeholder per weight (``meta["weight"]`` names it) and one per leaf of
    (args, kwargs); ``constants`` are tensors the module made while it was traced. ``written`` are
    the paths, as in `PythonState`, of what the forward builds at its first call and keeps.
    """

    gm: GraphModule
    inputs: list[Node]
    constants: dict[str, Tensor]
    out_spec: TreeSpec
    time: Node | None
    written: frozenset[str] = frozenset()


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], has_timestep: bool = True
) -> Traced:
    """The graph of ``model(*args, **kwargs)`` in evaluation mode, for exactly these shapes; the
    second of ``args`` is the timestep, where it ``has_timestep``.

    Raises `CannotTrace` for control flow that depends on values, for buffers the forward changes
    and whatever else torch.export refuses.
    """
    with one_at_a_time, in_this_thread(), quietly(), torch.no_grad():
        reachable = PythonState({"model": model}, training=False)
        sources = RandomSources(reachable)
        if sources.iterators:
            kinds = ", ".join(sources.iterators)
            raise CannotTrace(f"forward may read {kinds}, which nobody can set back", alone=True)
        shared = [tensor for _, tensor in reachable.reach.tensors]  # by mirrors
        try:
            with kept(shared):
                traced = _traced(model, args, kwargs)
        except CannotMirror as error:
            raise CannotTrace(str(error), alone=True) from error
        except ChangesItself as error:
            raise CannotTrace(str(error), True, error.paths) from error
        finally:
            reachable.forget_fakes()
            sources.put_back()
    if has_timestep and len(args) > 1 and is_tensor(traced.inputs[1]):
        traced.time = traced.inputs[1]
    return traced


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    recorded = record(evaluating(mirrored(model)), args, kwargs)
    if recorded is not None:
        gm, inputs, out_spec, written = recorded
        return Traced(gm, inputs, {}, out_spec, None, written)
    written = written_by(evaluating(mirrored(model)), args, kwargs)
    twin = evaluating(mirrored(model))
    try:
        with exporting_in_this_thread(), unnoticed():
            program = torch.export.export(twin, args, kwargs, strict=False)
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    # torch.export raises exceptions of many kinds, user code of any kind
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise CannotTrace(f"{type(error).__name__}: {first}") from error
    for output in program.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            what = "its argument " if output.kind is OutputKind.USER_INPUT_MUTATION else ""
            raise CannotTrace(f"forward writes to {what}{output.target!r}")
    return _with_named_weights(program, written)


def evaluating(model: nn.Module) -> nn.Module:
    """``model`` with every module in it in evaluation mode, whatever ``eval`` of a class does."""
    for module in model.modules():
        module.training = False
    return model


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _with_named_weights(program: ExportedProgram, written: frozenset[str]) -> Traced:
    gm = program.graph_module
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inputs: list[Node] = []
    constants: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            raise CannotTrace(f"the graph has a submodule {node.target!r} (control flow)")
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
            continue
        assert spec.target is not None
        node.meta["weight"] = spec.target
        held = program.constants.get(spec.target)
        if spec.kind is InputKind.CONSTANT_TENSOR and isinstance(held, Tensor):
            constants[spec.target] = held
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            raise CannotTrace(f"the graph reads {spec.target!r}, which is not a tensor")
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    return Traced(gm, inputs, constants, out_spec, None, written)
