"""Export to ONNX and TensorRT.

    sf.export.onnx("...")          a network as an ONNX file

What needs onnx, onnxruntime or TensorRT is imported when it is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepfuse.engine.export.metadata import Metadata, read_metadata
    from stepfuse.engine.export.onnx_file import Exported, onnx

__all__ = ["Exported", "Metadata", "onnx", "read_metadata"]

# name: its module. No module may have the name of one of these functions, which it would hide.
_HOMES = {
    "Exported": "onnx_file",
    "Metadata": "metadata",
    "onnx": "onnx_file",
    "read_metadata": "metadata",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
