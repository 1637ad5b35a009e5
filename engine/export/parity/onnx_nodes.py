"""Run an ONNX file and look inside: named intermediate values, and half precision on the CPU."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.export.libraries import library
from stepfuse.engine.export.to_onnx.facts import parse_model
from stepfuse.engine.export.to_onnx.graph import MODULE
from stepfuse.engine.export.to_onnx.runtime import CPU, DTYPES, quiet_options
from stepfuse.engine.export.to_onnx.write import PROTOBUF_LIMIT

SCOPES = "pkg.torch.onnx.name_scopes"
FLOAT = 1  # ONNX's numbers of the types
HALVES = {10: "float16", 16: "bfloat16"}


class OnnxProbe:
    """An ONNX file on the CPU, as ``probe(x, t, **condition)`` and layer by layer.

    A file in half precision is run in float32 with the result of every operation rounded to float16
    or bfloat16, while matrix products add in float32: that is what a GPU does. ONNX Runtime's own
    CPU kernels do not take bfloat16, and keep float32 between many operations of a float16 file,
    which hides overflow.

    Raises ValueError for a file that is truncated, no network, or too large to be rounded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.runtime = library("onnxruntime", "checking an ONNX file")
        self.folder = str(Path(path).resolve().parent)
        # weights in a second file stay there
        self.model = parse_model(path)
        kinds = {tensor.data_type for tensor in self.model.graph.initializer}
        half = next((kind for kind in HALVES if kind in kinds), None)
        self.emulated = half is not None
        if half is not None:
            self.model = rounded_to_half(parse_model(path, weights=True), half)
            if self.model.ByteSize() >= PROTOBUF_LIMIT:
                raise ValueError(
                    f"{path} is too large to be rounded to {HALVES[half]} in memory; give check a "
                    "runtime, OnnxDenoiser(path) say, in place of the path"
                )
        weights = {tensor.name for tensor in self.model.graph.initializer}
        self.inputs = [v.name for v in self.model.graph.input if v.name not in weights]
        self.session = self._session(self.model)

    def __call__(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """The first output, on the CPU."""
        feeds = dict(zip(self.inputs, (x, t), strict=False))
        found: Tensor = self._run(self.session, {**feeds, **condition}, None)[0]
        return found

    def values(self, names: Iterable[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Intermediate results by the name of the ONNX value."""
        wanted = list(dict.fromkeys(names))
        onnx = library("onnx", "checking an ONNX file")
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        tensors = self._run(self._session(model), inputs, wanted)
        return dict(zip(wanted, tensors, strict=True))

    def layer_values(self, layers: Iterable[str]) -> dict[str, str]:
        """Layer -> name of the ONNX value that is its output, for the layers that are found.

        The exporter writes the module that a node came from beside the node; where that was lost,
        the names of the weights tell.
        """
        known = set(layers)
        by_scope: dict[str, str] = {}
        by_weight: dict[str, str] = {}
        weights = {tensor.name for tensor in self.model.graph.initializer}
        makers: dict[str, str] = {}
        for node in self.model.graph.node:
            scope = _scope(node)
            if scope is not None and (layer := _match(scope, known)) is not None:
                by_scope[layer] = node.output[0]
            makers.update(dict.fromkeys(node.output, node.op_type))
            # a norm goes on after its weights were applied
            whole = node.op_type in ("Conv", "Gemm", "Gather") or "MatMul" in {
                makers.get(name) for name in node.input
            }
            for name in weights.intersection(node.input) if whole else ():
                if (layer := _match(name.rpartition(".")[0], known)) is not None:
                    by_weight[layer] = node.output[0]
        return {**by_weight, **by_scope}

    def _session(self, model: Any) -> Any:
        options = quiet_options(self.runtime)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", self.folder
        )
        return self.runtime.InferenceSession(model.SerializeToString(), options, providers=[CPU])

    def _run(
        self, session: Any, inputs: Mapping[str, Tensor], outputs: list[str] | None
    ) -> list[Tensor]:
        feeds = {}
        for wanted in session.get_inputs():
            value = inputs[wanted.name].detach().cpu()
            dtype, _ = DTYPES.get(wanted.type, (value.dtype, None))
            feeds[wanted.name] = value.to(dtype).numpy()
        return [torch.from_numpy(value) for value in session.run(outputs, feeds)]


def _scope(node: Any) -> str | None:
    """The module that a node came from, as `stepfuse.export.onnx` or PyTorch's exporter say it."""
    props = {entry.key: entry.value for entry in node.metadata_props}
    if MODULE in props:
        return str(props[MODULE])
    # the last of the scopes is the operation itself
    names = ast.literal_eval(props[SCOPES])[:-1] if SCOPES in props else []
    return str(names[-1]) if names else None


def _match(scope: str, known: set[str]) -> str | None:
    """The layer of that name, perhaps below the module that was wrapped around the network."""
    inner = scope.partition(".")[2]
    return scope if scope in known else inner if inner in known else None


def rounded_to_half(model: Any, half: int) -> Any:
    """A float32 model that rounds to ``half``, of `HALVES`, what has that type in ``model``."""
    onnx = library("onnx", "checking an ONNX file")
    helper = onnx.helper
    inferred = onnx.shape_inference.infer_shapes(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    named = (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
    narrow = {v.name for v in named if v.type.tensor_type.elem_type == half}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in graph.initializer:
        _widen(onnx, tensor, half)
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(onnx, attribute.t, half)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = FLOAT
        exact = {name: f"{name}/exact" for name in node.output if name in narrow}
        outputs = [exact.get(name, name) for name in node.output]
        del node.output[:]
        node.output.extend(outputs)
        nodes.append(node)
        for name, before in exact.items():
            rounded = f"{name}/{HALVES[half]}"
            nodes.append(helper.make_node("Cast", [before], [rounded], to=half))
            nodes.append(helper.make_node("Cast", [rounded], [name], to=FLOAT))
            # the value keeps its name and where it came from
            for cast in nodes[-2:]:
                cast.metadata_props.extend(node.metadata_props)
    copies = [onnx.NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)
    return result


def _widen(onnx: Any, tensor: Any, half: int) -> None:
    """A tensor of that type as float32, in place."""
    if tensor.data_type == half:
        values = onnx.numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
