"""An ONNX graph becomes a file: checked as it will be read, whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepfuse._version import __version__
from stepfuse.engine.export.libraries import library
from stepfuse.engine.export.metadata import Metadata
from stepfuse.engine.export.to_onnx.graph import BRANCHES
from stepfuse.engine.files.writing import check_file, write_file

PROTOBUF_LIMIT = 2**31 - 2**20  # one protobuf message must stay below 2 GB
_ALIGNMENT = 4096  # of tensors in a data file, so that they can be mapped into memory
_SMALL = 1024  # bytes; what shape inference may want to read stays in the model


class BadGraph(ValueError):
    """The checker of ONNX found the graph wrong."""


class Draft:
    """A model that is about to be written, its weights inside or in a file of their own.

    The data file is named after its content, and is there before the model that names it: whoever
    reads the model finds the weights that belong to it, also while both are being replaced.

    Args:
        model: ``onnx_ir.Model``.
        external_data: weights in a file of their own; None for "above 2 GB".

    ``branches`` says that the network asks for its batch size, see `build`.

    Raises OSError where ``path`` cannot be written, `BadGraph` where the checker complains,
    ValueError for weights that do not fit.
    """

    def __init__(
        self,
        model: Any,
        path: str | os.PathLike[str],
        metadata: Metadata,
        external_data: bool | None,
    ) -> None:
        check_file(path)
        self.path, self.metadata = Path(path), metadata
        self.branches: bool = model.meta[BRANCHES]
        ir = library("onnx_ir", "writing an ONNX file")
        model.producer_name, model.producer_version = "stepfuse", __version__
        model.metadata_props.update(metadata.to_strings())
        weights = [v for v in model.graph.initializers.values() if v.const_value.nbytes > _SMALL]
        total = sum(v.const_value.nbytes for v in weights)
        if external_data is False and total > PROTOBUF_LIMIT:
            raise ValueError(
                f"weights of {total} bytes do not fit into one ONNX file; "
                "accepted: external_data=True or None"
            )
        self.data: Path | None = None
        self._tensors: list[Any] = []
        if external_data or (external_data is None and total > PROTOBUF_LIMIT):
            self._tensors = [value.const_value for value in weights]
            name = f"{self.path.stem}-{self._digest()[:16]}.data"
            self.data = self.path.with_name(name)
            for value, offset in zip(weights, self._offsets(), strict=True):
                tensor = value.const_value
                value.const_value = ir.ExternalTensor(
                    name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name
                )
        self.proto = ir.to_proto(model)
        _check(self.proto)

    def write_data(self) -> None:
        """Write the data file, where there is one."""
        if self.data is not None:
            write_file(self.data, self._chunks())

    def write_model(self) -> None:
        """Write the model, and remove the data file of the model that it replaces."""
        old = _data_files(self.path)
        write_file(self.path, self.proto.SerializeToString(deterministic=True))
        for path in old:
            if path != self.data:
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove a data file whose model was never written."""
        if self.data is not None and self.data not in _data_files(self.path):
            self.data.unlink(missing_ok=True)

    def _offsets(self) -> Iterator[int]:
        position = 0
        for tensor in self._tensors:
            yield position
            position += tensor.nbytes + _padding(tensor.nbytes)

    def _chunks(self) -> Iterator[bytes]:
        for tensor in self._tensors:
            yield tensor.tobytes()
            yield bytes(_padding(tensor.nbytes))

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()


def _padding(size: int) -> int:
    return -size % _ALIGNMENT


def _check(proto: Any) -> None:
    """The full checker and strict shape inference; weights outside the model count as inputs."""
    onnx = library("onnx", "checking an ONNX file")
    light = proto
    outside = [w for w in proto.graph.initializer if w.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        light = onnx.ModelProto()
        light.CopyFrom(proto)
        del light.graph.initializer[:]
        for weight in proto.graph.initializer:
            if weight.data_location == onnx.TensorProto.EXTERNAL:
                shape = list(weight.dims)
                info = onnx.helper.make_tensor_value_info(weight.name, weight.data_type, shape)
                light.graph.input.append(info)
            else:
                light.graph.initializer.append(weight)
    try:
        onnx.checker.check_model(light, full_check=True)
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BadGraph(f"the checker of ONNX refuses the model: {error}") from error


def _data_files(path: Path) -> list[Path]:
    """The data files beside ``path`` that the model there names and that were written here."""
    onnx = library("onnx", "reading an ONNX file")
    if not path.is_file():
        return []
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # whatever was there, it is no model
        return []
    names = {
        entry.value
        for weight in model.graph.initializer
        for entry in weight.external_data
        if entry.key == "location"
    }
    ours = f"{path.stem}-"
    return [
        path.with_name(name)
        for name in sorted(names)
        if Path(name).name == name and name.startswith(ours) and name.endswith(".data")
    ]
