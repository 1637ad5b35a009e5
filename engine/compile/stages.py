"""When a node runs: once per weights, once per timestep, or in every evaluation.

    weights ──► "weights" nodes ──► constants ─┐
    t ────────► "time" nodes ─────► table row ─┼─► "main" nodes ──► output
    x, condition ──────────────────────────────┘

"weights" nodes read weights only (layout changes, casts, packing): they run when the program is
built and when the weights are read again. "time" nodes read the timesteps too; `hoist_timestep`
marks them. Everything else is "main".
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import stage

_RANK = {"weights": 0, "time": 1, "main": 2}


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


def _stage_of(node: Node) -> str:
    if _once_is_not_enough(node):
        return "main"
    latest = max((stage(n) for n in node.all_input_nodes), key=_RANK.__getitem__, default="weights")
    return latest


def _once_is_not_enough(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    mutable = schema is not None and schema.is_mutable
    return torch.Tag.nondeterministic_seeded in tags or mutable
