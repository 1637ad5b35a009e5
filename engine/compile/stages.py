"""When a node runs: once per weights, once per timestep, or in every evaluation.

    weights ──► "weights" nodes ──► constants ─┐
    t ────────► "time" nodes ─────► table row ─┼─► "main" nodes ──► output
    x, condition ──────────────────────────────┘

"weights" nodes read weights only (layout changes, casts, packing): they run when the program is
built and when the weights are read again. "time" nodes read the timesteps too; `hoist_timestep`
marks them. Everything else is "main".
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import stage

Stage = Literal["weights", "time", "main"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def assign(gm: GraphModule) -> None:
    """Mark every node that depends on weights alone; keep "time" marks; the rest is "main"."""
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if "weight" in node.meta:
                node.meta["stage"] = "weights"
            elif stage(node) != "time":
                node.meta["stage"] = "main"
        elif node.op == "call_function":
            node.meta["stage"] = _stage_of(node)


def time_frontier(gm: GraphModule) -> list[Node]:
    """The "time" nodes that "main" nodes read: the columns of the table.

    Views of one result are not separated from it here: every reader gets its own column.
    """
    return [
        node
        for node in gm.graph.nodes
        if node.op == "call_function"
        and stage(node) == "time"
        and any(stage(user) == "main" or user.op == "output" for user in node.users)
    ]


def _stage_of(node: Node) -> str:
    if _once_is_not_enough(node):
        return "main"
    latest = max((stage(n) for n in node.all_input_nodes), key=STAGES.index, default="weights")
    return latest


def _once_is_not_enough(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    mutable = schema is not None and schema.is_mutable
    return torch.Tag.nondeterministic_seeded in tags or mutable
