"""The float32 twin of a half-precision ONNX model.

ONNX Runtime has no bfloat16 kernels for the CPU. With every half-precision type replaced by float32
the same graph runs with the same rounded weights, so that it can be compared with the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepfuse.engine.export.libraries import library


def promoted(model: Any) -> Any:
    """A copy of an ``onnx.ModelProto``, weights inside, that computes in float32."""
    onnx = library("onnx", "reading an ONNX file")
    numbers = onnx.TensorProto
    half = (numbers.FLOAT16, numbers.BFLOAT16)
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for graph in _graphs(onnx, twin.graph):
        for tensor in _tensors(onnx, graph):
            if tensor.data_type in half:
                content = onnx.numpy_helper.to_array(tensor).astype("float32")
                tensor.CopyFrom(onnx.numpy_helper.from_array(content, tensor.name))
        for value in (*graph.value_info, *graph.input, *graph.output):
            if value.type.tensor_type.elem_type in half:
                value.type.tensor_type.elem_type = numbers.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i in half:
                    attribute.i = numbers.FLOAT
    return twin


def _graphs(onnx: Any, graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(onnx, attribute.g)


def _tensors(onnx: Any, graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
