"""What an ONNX file says about itself, without its weights."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from stepfuse.engine.export.libraries import library
from stepfuse.engine.files.reading import check_regular, reason

# ONNX's numbers of its floating-point types
_PRECISIONS = {1: "fp32", 10: "fp16", 16: "bf16"}


@dataclass(frozen=True)
class OnnxFacts:
    """A file that was found and parsed.

    Attributes:
        path: of the file.
        precision: "fp32", "fp16" or "bf16": the type of most weights.
        metadata: its key-value pairs.
        model: onnx.ModelProto without external data.
    """

    path: Path
    precision: str
    metadata: dict[str, str]
    model: Any


def parse_model(path: str | os.PathLike[str], *, weights: bool = False) -> Any:
    """onnx.ModelProto of a file, with the weights of a second file beside it where wanted.

    Raises OSError where it cannot be read, ValueError where it is no ONNX file, or no file.
    """
    onnx = library("onnx", "reading an ONNX file")
    check_regular(path, "an ONNX file")
    try:
        return onnx.load(os.fspath(path), load_external_data=weights)
    except OSError:
        raise
    except Exception as error:  # protobuf has no public base class for its errors
        raise ValueError(f"{path} is truncated or no ONNX file: {reason(error)}") from None


def read_facts(path: str | os.PathLike[str]) -> OnnxFacts:
    """Parse a file.

    Raises OSError where it cannot be read, ValueError where it is no ONNX file or has no weights
    that are floating-point numbers.
    """
    found = Path(path)
    model = parse_model(found)
    weights: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        if tensor.data_type in _PRECISIONS:
            weights[_PRECISIONS[tensor.data_type]] += prod(tensor.dims)
    if not weights:
        raise ValueError(f"{path} is truncated or no network: it has no floating-point weights")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return OnnxFacts(found, weights.most_common(1)[0][0], metadata, model)
