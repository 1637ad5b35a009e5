"""Passes, one after the other, over a graph that runs before and after each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    Pass,
    PassContext,
    PassReport,
    fake_mode,
    infer,
    stage,
)
from stepfuse.engine.compile.stages import assign
from stepfuse.kernels.checks import received
from stepfuse.kernels.torch_names import UnsupportedOperatorException

_OPS = ("placeholder", "call_function", "output")


class PassFailed(RuntimeError):
    """What a pass made of the graph cannot run; ``name`` is the pass, "" where it is not known."""

    def __init__(self, name: str, error: BaseException) -> None:
        text = str(error).strip().partition("\n")[0]
        super().__init__(f"{type(error).__name__}: {text}")
        self.name = name


def rewrite(
    gm: GraphModule, passes: Iterable[Pass], context: PassContext, careful: bool = False
) -> list[PassReport]:
    """Apply ``passes`` in order; the graph is changed in place.

    With ``careful`` the graph is run on tensors without data after every pass.

    Raises `PassFailed` where a pass raises, or leaves what does not run if that is looked for.
    """
    assign(gm)
    expected = _results(gm)
    # an operator may not know its own result
    watched = careful and check(gm, "", expected) is None
    reports = []
    for pass_ in passes:
        name = pass_.__name__
        known = set(gm.graph.nodes)
        try:
            report = pass_(gm, context)
            if not isinstance(report, PassReport):
                raise TypeError(f"a pass must return a PassReport; got {received(report)}")
            _complete(gm, known, name)
            if (now := _results(gm)) != expected:
                raise ValueError(f"results are {now}, not {expected}")
            assign(gm)
        except Exception as error:
            raise PassFailed(name, error) from error
        if report.applies:
            reports.append(replace(report, name=name))
        if watched and (failure := check(gm, name, expected)) is not None:
            raise failure
    gm.graph.lint()
    return reports


def _complete(gm: GraphModule, known: set[Node], name: str) -> None:
    """Say of new nodes who made them, and what they compute where the pass did not."""
    for node in gm.graph.nodes:
        if node in known:
            continue
        if node.op not in _OPS:
            raise ValueError(f"a pass may add calls of functions alone; got {node.op} {node.name}")
        if node.op == "call_function" and "val" not in node.meta:
            infer(node)
        node.meta["made_by"] = name


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
            except UnsupportedOperatorException:  # it has nothing to say about shapes
                held[node] = node.meta.get("val")
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
