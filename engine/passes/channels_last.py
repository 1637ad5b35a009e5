"""Let every image be [N, H, W, C] in memory.

    x [N, C, H, W] ──► contiguous(channels_last) ──► convolutions ... ──► contiguous ──► output

A convolution then is a sum of plain matrix products on [H W, C], a GroupNorm reads channels side by
side, and flattening to tokens [N, H W, C] is a view. Values are unchanged; a different kernel may
add in a different order (float32: relative 1e-5).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from stepfuse.engine.passes.graph import PassReport, aten, call, calls, infer, stage, value

_FORMATS = {
    aten.conv2d.default: torch.channels_last,
    aten.conv2d.padding: torch.channels_last,
    aten.conv_transpose2d.input: torch.channels_last,
    aten.conv3d.default: torch.channels_last_3d,
}


def channels_last(gm: GraphModule) -> PassReport:
    """Convert the inputs of convolutions where they are not channels-last already."""
    report = PassReport("channels_last")
    for view in calls(gm, aten.view.default):
        view.target = aten.reshape.default  # views need strides that the new layout may not have
    converted: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or stage(node) == "weights":
            continue
        layout = _FORMATS.get(node.target)
        if layout is not None:
            report.count()
            source = node.args[0]
            assert isinstance(source, Node)
            if not value(source).is_contiguous(memory_format=layout):
                if source not in converted:
                    with gm.graph.inserting_after(source):
                        converted[source] = call(
                            gm.graph, aten.contiguous.default, source, memory_format=layout
                        )
                    _prefer(source, converted[source])
                node.replace_input_with(source, converted[source])
        infer(node)
    _restore_outputs(gm)
    report.note = f"{len(converted)} conversions"
    return report


def _prefer(source: Node, converted: Node) -> None:
    """Everything else that reads an image may as well read the converted one."""
    for user in list(source.users):
        if user is not converted and user.op != "output" and value_rank(source) == 4:
            user.replace_input_with(source, converted)


def value_rank(node: Node) -> int:
    """How many dimensions the node's tensor has."""
    return value(node).dim()


def _restore_outputs(gm: GraphModule) -> None:
    """Outputs are contiguous, as they are without this pass."""
    output = gm.graph.output_node()
    for result in output.all_input_nodes:
        if not value(result).is_contiguous():
            with gm.graph.inserting_before(output):
                plain = call(gm.graph, aten.contiguous.default, result)
            output.replace_input_with(result, plain)
