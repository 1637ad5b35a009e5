"""ONNX Runtime: its options and its providers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepfuse.kernels.backends import BackendUnavailable
from stepfuse.kernels.checks import received, shown

Provider = str | tuple[str, dict[str, Any]]

CPU = "CPUExecutionProvider"
_ON_CUDA = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
)
_PACKAGES = {
    **dict.fromkeys(_ON_CUDA[:2], "onnxruntime-gpu"),
    "NvTensorRTRTXExecutionProvider": "onnxruntime-trt-rtx",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "DmlExecutionProvider": "onnxruntime-directml",
    "QNNExecutionProvider": "onnxruntime-qnn",
}

# what ONNX Runtime calls the types that PyTorch can lend it: PyTorch's, NumPy's
DTYPES = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
    "tensor(double)": (torch.float64, np.float64),
    "tensor(int64)": (torch.int64, np.int64),
    "tensor(int32)": (torch.int32, np.int32),
    "tensor(bool)": (torch.bool, np.bool_),
}


def quiet_options(runtime: Any, threads: int | None = None) -> Any:
    """Session options: errors are raised, not printed; as many threads as torch has."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    # a thread that spins keeps the core from torch's own
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def check_providers(runtime: Any, providers: Sequence[Provider] | None) -> list[Provider]:
    """The providers to ask for. Raises `BackendUnavailable` for one that is not built in."""
    built_in = runtime.get_available_providers()
    if providers is None:
        gpu = [_ON_CUDA[0]] if _ON_CUDA[0] in built_in and torch.cuda.is_available() else []
        return [*gpu, CPU]
    if not isinstance(providers, (list, tuple)) or not providers:
        raise ValueError(f"providers must be a list, [{CPU!r}] say; got {shown(providers)}")
    for provider in providers:
        pair = isinstance(provider, tuple) and len(provider) == 2 and isinstance(provider[0], str)
        if not isinstance(provider, str) and not (pair and isinstance(provider[1], dict)):
            raise TypeError(
                f"providers must be names or (name, options); got {received(provider)} among them"
            )
        name = provider if isinstance(provider, str) else provider[0]
        if name in built_in:
            continue
        if name not in runtime.get_all_providers():
            raise BackendUnavailable(
                f"ONNX Runtime knows no provider {name!r}; here it has {', '.join(built_in)}"
            )
        package = _PACKAGES.get(name, "an onnxruntime that is built with it")
        raise BackendUnavailable(
            f"{name} is not in the onnxruntime that is installed, which has "
            f"{', '.join(built_in)}; install {package} in its place"
        )
    return list(providers)


def device_of(provider: Provider) -> torch.device:
    """Where the tensors of a provider are: on its GPU where PyTorch has it too, or on the CPU."""
    name, options = (provider, {}) if isinstance(provider, str) else provider
    if name in _ON_CUDA and torch.cuda.is_available():
        return torch.device("cuda", int(options.get("device_id", 0)))
    return torch.device("cpu")
