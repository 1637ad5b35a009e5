"""From nodes of a graph to one straight-line Python function (`writer`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.fx import Node

from stepfuse.engine.replay.workspace import Workspace
from stepfuse.engine.replay.writer import Writer


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
    made = {node.name for node in inputs}

    def named(value: Any) -> str | None:
        if not isinstance(value, Node):
            return None
        if value.name not in made and value.name not in bound:
            raise KeyError(f"{value.name} is computed in another stage")
        return value.name

    writer = Writer(bound, named)
    for node in nodes:
        writer.call(
            node.target,
            node.args,
            node.kwargs,
            reads=[source.name for source in node.all_input_nodes],
            makes=[node.name],
            target=node.name,
            result=node.meta.get("val"),
            by=node.meta.get("made_by", ""),
        )
        made.add(node.name)
    source = f"<optimized network, part {writer.parts}>"
    returned = [writer.text(result) for result in results]
    return writer.function("run", source, [node.name for node in inputs], returned, workspace)
