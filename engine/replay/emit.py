"""From nodes to one straight-line Python function.

    def run(x, t):
        v0 = conv(x, w0, b0, ...)
        v1 = group_norm_silu(v0, w1, ...)
        del v0

Weights and operators are globals of the function, results die after their last use. Beside the
operators themselves nothing is left of the network's Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.fx import Node

from stepfuse.engine.replay.workspace import Call, Plan, Planned, Workspace, may_alias
from stepfuse.kernels.direct import blank, directly


def emit(
    nodes: Iterable[Node],
    inputs: Sequence[Node],
    results: Sequence[Any],
    bound: dict[str, Any],
    workspace: Workspace | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Compile ``nodes`` to a function of ``inputs`` that returns ``results`` as a tuple.

    ``bound`` becomes the function's globals: it must map the name of every other node that is read
    to its value, and may be changed later to bind another value. What nodes make on the way lies in
    ``workspace``, as far as they can be told where to put it.
    """
    line = list(nodes)
    kept = {r.name for r in results if isinstance(r, Node)}
    plan = Plan([_as_call(node) for node in line] if workspace is not None else [], kept)
    if workspace is None or not plan.index:
        return _Emitter(inputs, bound, {}).function(line, results)
    return Planned(_Emitter(inputs, bound, plan.index).function(line, results), plan, workspace)


def maker(error: BaseException) -> str:
    """The pass that wrote the line in which a function made here failed, "" where it is unknown."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        makers = frame.f_globals.get(_MAKERS, {}).get(frame.f_code.co_filename, {})
        found = makers.get(trace.tb_lineno, found)
        trace = trace.tb_next
    return found


_MAKERS = "_k_makers"


def _as_call(node: Node) -> Call:
    reads = [n.name for n in node.all_input_nodes]
    like = blank(node.target, node.meta.get("val"))
    return Call([node.name], reads, like is None and may_alias(node.target), like)


class _Emitter:
    def __init__(
        self, inputs: Sequence[Node], bound: dict[str, Any], places: dict[str, int]
    ) -> None:
        self.inputs, self.bound, self.places = inputs, bound, places
        self.made = {node.name for node in inputs}

    def function(self, nodes: list[Node], results: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        last = {n.name: i for i, node in enumerate(nodes) for n in node.all_input_nodes}
        kept = {r.name for r in results if isinstance(r, Node)}
        body: list[str] = []
        makers: dict[int, str] = {}  # line of the source -> the pass that wrote it
        for i, node in enumerate(nodes):
            body.append(self._line(node))
            makers[len(body) + 1] = node.meta.get("made_by", "")
            self.made.add(node.name)
            reads = {n.name for n in node.all_input_nodes if n.name in self.made} | {node.name}
            dead = sorted(n for n in reads if last.get(n, i) == i and n not in kept)
            if dead:
                body.append(f"del {', '.join(dead)}")
        body.append(f"return ({''.join(self._text(r) + ', ' for r in results)})")
        arguments = [node.name for node in self.inputs] + ["_k_places"] * bool(self.places)
        header = f"def run({', '.join(arguments)}):\n"
        source = header + "".join(f"    {line}\n" for line in body)
        sources = self.bound.setdefault(_MAKERS, {})
        name = f"<optimized network, part {len(sources)}>"
        sources[name] = makers
        exec(compile(source, name, "exec"), self.bound)
        run: Callable[..., tuple[Any, ...]] = self.bound.pop("run")
        return run

    def _line(self, node: Node) -> str:
        if node.target is operator.getitem:
            source, index = node.args
            return f"{node.name} = {self._text(source)}[{index!r}]"
        parts = [self._text(a) for a in node.args]
        parts += [f"{k}={self._text(v)}" for k, v in node.kwargs.items()]
        if node.name in self.places:
            parts.append(f"out=_k_places[{self.places[node.name]}]")
        return f"{node.name} = {self._bind(directly(node.target))}({', '.join(parts)})"

    def _text(self, v: Any) -> str:
        if isinstance(v, Node):
            if v.name not in self.made and v.name not in self.bound:
                raise KeyError(f"{v.name} is computed in another stage")
            return v.name
        if isinstance(v, (list, tuple)):
            inner = "".join(f"{self._text(part)}, " for part in v)
            return f"[{inner}]" if isinstance(v, list) else f"({inner})"
        if v is None or isinstance(v, (bool, int, str)):
            return repr(v)
        return self._bind(v)

    def _bind(self, v: Any) -> str:
        name = f"_k{id(v)}"  # no two living objects share it, and ``bound`` keeps them alive
        self.bound[name] = v
        return name
