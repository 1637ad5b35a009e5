"""Export to ONNX and TensorRT, and their runtimes as denoisers.

    sf.export.onnx(model, path)          a network as an ONNX file
    sf.export.onnx_loop(model, path)     a whole sampler as an ONNX file
    sf.export.tensorrt(file, path)       a TensorRT engine from an ONNX file
    sf.export.check(model, file)         how far the file is from the model

What needs onnx, onnxruntime or TensorRT is imported when it is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepfuse.engine.export.loop_file import onnx_loop
    from stepfuse.engine.export.metadata import Metadata, read_metadata
    from stepfuse.engine.export.onnx_denoiser import OnnxDenoiser
    from stepfuse.engine.export.onnx_file import onnx
    from stepfuse.engine.export.onnx_job import Exported
    from stepfuse.engine.export.parity import Tolerance
    from stepfuse.engine.export.parity_check import check
    from stepfuse.engine.export.parity_report import Report
    from stepfuse.engine.export.tensorrt_engine import BuildFailed, tensorrt
    from stepfuse.engine.export.tensorrt_file import BadEngineFile
    from stepfuse.engine.export.tensorrt_runtime import TensorRTDenoiser

__all__ = [
    "BadEngineFile",
    "BuildFailed",
    "Exported",
    "Metadata",
    "OnnxDenoiser",
    "Report",
    "TensorRTDenoiser",
    "Tolerance",
    "check",
    "onnx",
    "onnx_loop",
    "read_metadata",
    "tensorrt",
]

# name: its module. No module may have the name of one of these functions, which it would hide.
_HOMES = {
    "BadEngineFile": "tensorrt_file",
    "BuildFailed": "tensorrt_engine",
    "Exported": "onnx_job",
    "Metadata": "metadata",
    "OnnxDenoiser": "onnx_denoiser",
    "Report": "parity_report",
    "TensorRTDenoiser": "tensorrt_runtime",
    "Tolerance": "parity",
    "check": "parity_check",
    "onnx": "onnx_file",
    "onnx_loop": "loop_file",
    "read_metadata": "metadata",
    "tensorrt": "tensorrt_engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
