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
    from stepfuse.engine.export.metadata import Metadata, read_metadata
    from stepfuse.engine.export.parity.check_file import check
    from stepfuse.engine.export.parity.compare import Tolerance
    from stepfuse.engine.export.parity.report import Report
    from stepfuse.engine.export.to_onnx.denoiser import OnnxDenoiser
    from stepfuse.engine.export.to_onnx.job import Exported
    from stepfuse.engine.export.to_onnx.loop_file import onnx_loop
    from stepfuse.engine.export.to_onnx.network_file import onnx
    from stepfuse.engine.export.to_tensorrt.engine import BuildFailed, tensorrt
    from stepfuse.engine.export.to_tensorrt.engine_file import BadEngineFile
    from stepfuse.engine.export.to_tensorrt.runtime import TensorRTDenoiser

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
    "BadEngineFile": "to_tensorrt.engine_file",
    "BuildFailed": "to_tensorrt.engine",
    "Exported": "to_onnx.job",
    "Metadata": "metadata",
    "OnnxDenoiser": "to_onnx.denoiser",
    "Report": "parity.report",
    "TensorRTDenoiser": "to_tensorrt.runtime",
    "Tolerance": "parity.compare",
    "check": "parity.check_file",
    "onnx": "to_onnx.network_file",
    "onnx_loop": "to_onnx.loop_file",
    "read_metadata": "metadata",
    "tensorrt": "to_tensorrt.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
