"""One look before a file gets its name: does ONNX Runtime compute what the network computes?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.libraries import library
from stepfuse.engine.export.network import Network, Source
from stepfuse.engine.export.to_onnx.loop_graph import Loop
from stepfuse.engine.export.to_onnx.promote import promoted
from stepfuse.engine.export.to_onnx.runtime import CPU, quiet_options
from stepfuse.engine.export.to_onnx.write import Draft
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.kernels.backends import BackendUnavailable

# of the largest output. Half precision is compared with its arithmetic promoted to float32 on both
# sides: another order of summation, and for half types the constants that export had folded
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2}
LOOP_FACTOR = 10  # clipping and the steps to small t carry an error on
_MOST = 4  # samples: a look, not a benchmark


@torch.no_grad()
def verify_network(draft: Draft, network: Network, source: Source, batch: BatchProfile) -> str:
    """Compare, and say in words how it went, or why it could not be done.

    Raises ValueError where the two differ by more than `TOLERANCES`.
    """
    twin = network.promoted()
    cases = []
    for count in _counts(draft, batch, _MOST):
        inputs = source.with_batch(count).inputs
        inputs["x"] = _noise(inputs["x"].shape)
        if draft.metadata.schedule is not None:
            last = draft.metadata.schedule.num_train_timesteps - 1
            inputs["t"] = torch.linspace(last, 0, count).to(torch.int64)
        cases.append((inputs, twin(*inputs.values())))
    return _compared(draft, cases, TOLERANCES[network.precision])


def verify_loop(
    draft: Draft, sampler: Sampler, source: Source, batch: BatchProfile, loop: Loop
) -> str:
    """The same for a whole sampler, whose model is a `Network.promoted`."""
    cases = []
    for count in _counts(draft, batch, 1):
        example = source.with_batch(count)
        shape = tuple(example.x.shape)
        inputs = {"x_T": _noise(shape), **example.condition}
        if loop.noisy:
            inputs["noise"] = _noise((len(sampler.timesteps), *shape))
        expected = sampler.sample(
            shape, x_T=inputs["x_T"], noise=inputs.get("noise"), condition=example.condition
        )
        if loop.normalization is not None:
            expected = 2 * loop.normalization.decode(expected) - 1
        cases.append((inputs, expected))
    return _compared(draft, cases, LOOP_FACTOR * TOLERANCES[draft.metadata.precision])


def _counts(draft: Draft, batch: BatchProfile, most: int) -> list[int]:
    """Batch sizes to try: one, or both ends where the network asks for its batch size."""
    if draft.branches:
        return [batch.minimum, batch.maximum]
    return [min(batch.maximum, max(batch.minimum, most))]


def _compared(
    draft: Draft, cases: Sequence[tuple[dict[str, Tensor], Tensor]], tolerance: float
) -> str:
    try:
        runtime = library("onnxruntime", "comparing a file with its network")
    except BackendUnavailable as reason:
        return f"no: {reason}"
    options, model, how = quiet_options(runtime), draft.proto, ""
    if draft.metadata.precision != "fp32":
        if draft.data is not None:
            return "no: half precision with weights in a file of their own"
        model, how = promoted(model), ", arithmetic promoted to float32"
    elif draft.data is not None:
        folder = str(draft.data.parent.resolve())
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    worst = 0.0
    for inputs, expected in cases:
        (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        error = float((torch.from_numpy(got) - expected).abs().max())
        allowed = tolerance * max(1.0, float(expected.abs().max()))
        if not error <= allowed:
            raise ValueError(
                f"the exported file differs from the network by {error:.3g}, batch {len(got)}; "
                f"allowed: {allowed:.3g}"
            )
        worst = max(worst, error)
    counts = " and ".join(str(len(expected)) for _, expected in cases)
    return (
        f"ONNX Runtime {runtime.__version__} on the CPU, batch {counts}{how}: max abs {worst:.3g}"
    )


def _noise(shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
