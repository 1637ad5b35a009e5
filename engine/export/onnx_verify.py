"""One look before a file gets its name: does ONNX Runtime compute what the network computes?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.libraries import library
from stepfuse.kernels.backends import BackendUnavailable

if TYPE_CHECKING:
    from stepfuse.engine.export.network import Network, Source
    from stepfuse.engine.export.onnx_write import Draft

# of the largest output. float32: order of summation over a whole network. Half precision: two
# roundings of 2^-11 and 2^-8 an operator, in another order, through some hundred operators.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
_MOST = 4  # samples: a look, not a benchmark


def verify_draft(draft: Draft, network: Network, source: Source, batch: BatchProfile) -> str:
    """Compare, and say in words how it went, or why it could not be done.

    Raises ValueError where the two differ by more than `TOLERANCES`.
    """
    try:
        runtime = library("onnxruntime", "comparing a file with its network")
    except BackendUnavailable as reason:
        return f"no: {reason}"
    options = quiet_options(runtime)
    if draft.data is not None:
        folder = str(draft.data.parent.resolve())
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    content = draft.proto.SerializeToString()
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except runtime.capi.onnxruntime_pybind11_state.NotImplemented as reason:
        return f"no: ONNX Runtime {runtime.__version__} has no CPU kernel: {_short(reason)}"
    count = min(batch.maximum, max(batch.minimum, _MOST))
    example = _varied(source.with_batch(count).inputs)
    with torch.no_grad():
        expected = network(*example.values())
    (got,) = session.run(None, {name: value.numpy() for name, value in example.items()})
    error = float((torch.from_numpy(got) - expected).abs().max())
    allowed = TOLERANCES[network.precision] * max(1.0, float(expected.abs().max()))
    if not error <= allowed:
        raise ValueError(
            f"the exported network differs from the original by {error:.3g}; allowed: {allowed:.3g}"
        )
    return f"ONNX Runtime {runtime.__version__} on the CPU, batch {count}: max abs {error:.3g}"


def quiet_options(runtime: Any, threads: int | None = None) -> Any:
    """Session options: errors are raised, not printed; as many threads as torch has."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    # a thread that spins keeps the core from torch's own
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _varied(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The example with noise for x, so that its samples differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(inputs["x"].shape, generator=generator)
    return {**inputs, "x": x}


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
