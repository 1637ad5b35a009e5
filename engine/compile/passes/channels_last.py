"""Let every image be [N, H, W, C] in memory.

    x [N, C, H, W] ──► contiguous(channels_last) ──► convolutions ... ──► contiguous ──► output

A convolution then is a sum of plain matrix products on [H W, C], a GroupNorm reads channels side by
side, and flattening to tokens [N, H W, C] is a view. On CUDA filters are read channels-last, too:
the weight itself is turned where it lies (`weights.turned`), or a copy is made once; on the CPU
packing does that. Values are unchanged; a different kernel may add in a different order
(float32: relative 1e-5).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    infer,
    is_call,
    is_tensor,
    replace,
    stage,
    value,
)

_FORMATS = {
    aten.conv2d.default: torch.channels_last,
    aten.conv2d.padding: torch.channels_last,
    aten.conv_transpose2d.input: torch.channels_last,
    aten.conv3d.default: torch.channels_last_3d,
}


def channels_last(gm: GraphModule, context: PassContext) -> PassReport:
    """Convert the inputs of convolutions where they are not channels-last already."""
    report = PassReport("channels_last")
    for view in calls(gm, aten.view.default, aten._unsafe_view.default):
        view.target = aten.reshape.default  # views need strides that the new layout may not have
    converted: dict[Node, Node] = {}
    dropped = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or stage(node) == "weights":
            continue
        if _undoes(node):
            dropped += 1
            replace(node, node.all_input_nodes[0])
            continue
        layout = _FORMATS.get(node.target)
        if layout is not None:
            report.count()
            image, filters = node.args[:2]
            assert isinstance(image, Node)
            assert isinstance(filters, Node)
            _convert(gm, node, image, layout, converted)
            if turns_filters(value(filters).device) and stage(filters) == "weights":
                _convert(gm, node, filters, layout, {})
        try:
            infer(node)
        except RuntimeError:  # it needs strides that the new layout has not
            _make_plain(gm, node)
            infer(node)
    _restore_outputs(gm)
    report.note = f"{len(converted)} conversions, {dropped} contiguous() dropped"
    return report


def turns_filters(device: torch.device) -> bool:
    """Whether convolutions on such a device read their filters channels-last."""
    return device.type != "cpu"


def _make_plain(gm: GraphModule, node: Node) -> None:
    """Let ``node`` read every tensor in its plain layout."""
    for source in node.all_input_nodes:
        if is_tensor(source) and not value(source).is_contiguous():
            with gm.graph.inserting_before(node):
                plain = call(gm.graph, aten.contiguous.default, source)
            node.replace_input_with(source, plain)


def _undoes(node: Node) -> bool:
    """A ``contiguous()`` of a channels-last image, which no later operator needs."""
    if not is_call(node, aten.contiguous.default, aten.clone.default):
        return False
    wanted = node.kwargs.get("memory_format", torch.contiguous_format)
    # decompositions write contiguous() as a clone that names the layout; others are copies
    plain = node.target is aten.clone.default and "memory_format" not in node.kwargs
    if plain or wanted is not torch.contiguous_format or len(node.args) > 1:
        return False
    source = value(node.all_input_nodes[0])
    return source.dim() == 4 and source.is_contiguous(memory_format=torch.channels_last)


def _convert(
    gm: GraphModule,
    node: Node,
    source: Node,
    layout: torch.memory_format,
    converted: dict[Node, Node],
) -> None:
    """Let ``node`` read ``source`` in this layout; a conversion is made once and noted."""
    image = value(source)
    if image.is_contiguous(memory_format=layout):
        if image.is_contiguous() and image.dim() == 4 and image.shape[1] == 1:
            node.replace_input_with(source, _of_one_channel(gm, source, node))
        return
    if source not in converted:
        with gm.graph.inserting_after(source):
            converted[source] = call(
                gm.graph, aten.contiguous.default, source, memory_format=layout
            )
        _prefer(source, converted[source])
    node.replace_input_with(source, converted[source])


def _of_one_channel(gm: GraphModule, source: Node, before: Node) -> Node:
    """The same image with the strides of channels-last.

    With one channel both layouts are one, and operators choose by the strides in which layout their
    result lies.
    """
    count, _, height, width = value(source).shape
    with gm.graph.inserting_before(before):
        rows = call(gm.graph, aten.reshape.default, source, [count, height, width, 1])
        return call(gm.graph, aten.permute.default, rows, [0, 3, 1, 2])


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
