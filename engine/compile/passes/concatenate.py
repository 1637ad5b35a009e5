"""Concatenate images by their channels while they stay [N, H, W, C] in memory.

    cat([a, b], 1) ──► every pixel of a, then the same pixel of b

PyTorch's `cat` guesses the layout of its result from strides, and those of a single image that
came from tokens [1, H W, C] do not tell: the result may be [N, C, H, W], which every convolution
after it would have to turn. Copies bytes, so that any dtype will do. Exact. CPU only.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    calls,
    finish,
    replace,
    stage,
    value,
)
from stepfuse.kernels.backends import why_not
from stepfuse.kernels.concatenate import OP as CONCATENATE


def concatenate(gm: GraphModule, context: PassContext) -> PassReport:
    """Replace every `cat` of channels-last images."""
    report = PassReport("concatenate")
    for node in calls(gm, aten.cat.default):
        if stage(node) == "main" and report.count(_problem(node)):
            with gm.graph.inserting_before(node):
                made = gm.graph.call_function(CONCATENATE, (node.args[0],))
            made.meta.update(val=node.meta["val"], stage="main")
            replace(node, made)
    finish(gm)
    return report


def _problem(node: Node) -> str:
    result, parts = value(node), node.all_input_nodes
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if why_not("cpp", result.device):
        return "no C++ module for it"
    if result.dim() != 4 or dim not in (1, -3):
        return "not channels of images"
    layouts = [value(part).is_contiguous(memory_format=torch.channels_last) for part in parts]
    if not all(layouts) or not result.is_contiguous(memory_format=torch.channels_last):
        return "not channels-last"
    if any(value(part).dtype != result.dtype for part in parts):
        return "different dtypes"
    return ""
