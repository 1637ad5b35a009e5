"""`onnx`: a network as an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.network import Network
from stepfuse.engine.export.to_onnx.graph import build
from stepfuse.engine.export.to_onnx.job import Exported, Precision, prepare
from stepfuse.engine.export.to_onnx.verify import verify_network
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.update import PredictionType, VarianceType
from stepfuse.kernels.checks import check_flag


def onnx(
    model: nn.Module | Checkpoint,
    path: str | os.PathLike[str],
    *,
    example_inputs: Sequence[Any] | None = None,
    sample_shape: Sequence[int] | None = None,
    schedule: Schedule | None = None,
    prediction_type: PredictionType | None = None,
    variance_type: VarianceType | None = None,
    batch: str | int | BatchProfile = "1:8:64",
    precision: Precision = "fp32",
    opset: int | None = None,
    dynamic_size: bool = False,
    external_data: bool | None = None,
    verify: bool = True,
    progress: bool = False,
) -> Exported:
    """Write a network as an ONNX file that says itself how to sample from it.

        sf.export.onnx(sf.load("digits"), "digits.onnx")
        sf.export.onnx(unet, "unet.onnx", example_inputs=(x, t, {"labels": labels}))

    The inputs are "x" float32 [N, C, ...], "t" int64 [N] and the conditions by name, the output is
    "output", float32, in every precision. Class labels are an input of their own: the number of
    classes stands for "no class". Only standard operators are used: a fused norm becomes
    GroupNormalization (opset 21 and up) or InstanceNormalization, Sigmoid and Mul. Schedule,
    prediction type and the rest are in the file: see `Metadata` and `read_metadata`.

    Args:
        model: a `Checkpoint`, this project's UNet, an optimised network (its original is exported:
            the passes are for this library's own kernels), a diffusers UNet2DModel or
            UNet2DConditionModel, or any nn.Module with ``example_inputs``. It is not changed.
        path: of the file; it appears whole or not at all.
        example_inputs: (x, t) or (x, t, {name: tensor}) with at least one sample; constants among
            the named ones are frozen into the file.
        sample_shape: (C, H, W), where neither the model nor the example says it.
        schedule, prediction_type, variance_type: for the metadata; a `Checkpoint` knows them.
        batch: "MIN:OPT:MAX" for a dynamic batch, or one number for a fixed one.
        precision: "fp32", "fp16" or "bf16", of weights and arithmetic; statistics of norms are
            float32 in all of them.
        opset: 18 .. 23; fp16 needs 21, bf16 needs 22. By default 21, and 22 for bf16.
        dynamic_size: height and width are dynamic too, in multiples the network accepts.
        external_data: weights in a second file beside the first; None for networks above 2 GB.
        verify: run the file in ONNX Runtime on one batch and compare, before it gets its name.
        progress: show a progress bar.

    Raises:
        ValueError: an argument that is not accepted, a network that has no such ONNX form, or a
            file that differs from the network.
        TypeError: no network, or inputs of the wrong kind.
        BackendUnavailable: onnx or onnxscript is not installed.
        OSError: the file cannot be written.
    """
    check_flag("dynamic_size", dynamic_size)
    job = prepare(
        model,
        path,
        example_inputs,
        sample_shape,
        schedule,
        prediction_type,
        variance_type,
        batch,
        precision,
        opset,
        external_data,
        verify,
        progress,
    )
    network = Network(job.source, precision)
    return job.write(
        lambda: build(network, job.source, job.batch, job.opset, dynamic_size),
        lambda draft: verify_network(draft, network, job.source, job.batch),
    )
