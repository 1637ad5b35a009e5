"""What a graph does beside computing its results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from stepfuse.engine.replay.workspace import may_alias
from stepfuse.kernels.torch_names import tree_leaves


def effect(nodes: Iterable[Node]) -> str:
    """The first thing that another run would do once more, in words; "" where there is none.

    That is a random number that is drawn, or a tensor written to that was there before the graph
    ran: a weight, a buffer, an argument.
    """
    for node in nodes:
        if _draws(node):
            return f"{node.target} draws random numbers"
        if any(_was_there(written) for written in _written(node)):
            return f"{node.target} writes to a weight or an argument"
    return ""


def _draws(node: Node) -> bool:
    """Whether a call draws random numbers; attention does not, where it drops nothing."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return all(value != 0 for argument, value in _arguments(node) if argument.name == "dropout_p")


def _written(node: Node) -> Iterator[Node]:
    """The arguments that the operator of a call writes to."""
    for argument, value in _arguments(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (v for v in tree_leaves(value) if isinstance(v, Node))


def _arguments(node: Node) -> Iterator[tuple[Any, Any]]:
    """The arguments as the operator declares them, each with what it is given here."""
    schema = getattr(node.target, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema is not None else ()):
        if place < len(node.args):
            yield argument, node.args[place]
        else:
            yield argument, node.kwargs.get(argument.name, argument.default_value)


def _was_there(node: Node) -> bool:
    """Whether a node may be (a view of) something that the graph is given."""
    waiting, seen = [node], set()
    while waiting:
        one = waiting.pop()
        if one.op != "call_function":
            return True
        if one not in seen and may_alias(one.target):
            seen.add(one)
            waiting += one.all_input_nodes
    return False
