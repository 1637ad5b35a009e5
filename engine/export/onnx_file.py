"""`onnx`: a network as an ONNX file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from tqdm.auto import tqdm

from stepfuse.engine.checkpoint import Checkpoint
from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.libraries import library
from stepfuse.engine.export.metadata import Metadata
from stepfuse.engine.export.network import DTYPES, Network, Source, describe
from stepfuse.engine.export.onnx_graph import build
from stepfuse.engine.export.onnx_verify import verify_draft
from stepfuse.engine.export.onnx_write import Draft
from stepfuse.engine.files import check_file
from stepfuse.engine.schedule import Schedule
from stepfuse.engine.table import PredictionType, VarianceType

Precision = Literal["fp32", "fp16", "bf16"]

OPSETS = range(18, 24)
# GroupNormalization with float32 statistics came with 21, bfloat16 convolutions with 22
_OPSET_FOR = {"fp32": 21, "fp16": 21, "bf16": 22}
_FIRST_OPSET = {"fp32": 18, "fp16": 21, "bf16": 22}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the ONNX file.
        data: the file beside it that holds the weights, or None where they are inside.
        metadata: what the file says of itself.
        inputs: name -> shape of every input, "batch" standing for the dynamic batch.
        operators: how many nodes of each kind the graph has.
        verified: how the file was compared with the network, or why not.
    """

    path: Path
    data: Path | None
    metadata: Metadata
    inputs: dict[str, tuple[int | str, ...]]
    operators: Counter[str] = field(repr=False)
    verified: str


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
    profile = BatchProfile.parse(batch)
    opset = checked_opset(opset, precision)
    for name in ("onnx", "onnxscript"):
        library(name, "exporting to ONNX")
    check_file(path)
    source = describe(model, example_inputs, sample_shape)
    metadata = _completed(source, schedule, prediction_type, variance_type)
    metadata = replace(metadata, batch=profile, precision=precision, opset=opset)
    stages = ("tracing", "checking", "comparing", "writing")
    with tqdm(total=len(stages), unit="stage", disable=not progress) as bar:
        bar.set_description(stages[0])
        network = Network(source, precision)
        graph = build(network, source, profile, opset, dynamic_size)
        _advance(bar, stages[1])
        draft = Draft(graph, path, metadata, external_data)
        try:
            _advance(bar, stages[2])
            draft.write_data()
            outcome = "not asked for"
            if verify:
                outcome = verify_draft(draft, network, source, profile)
            _advance(bar, stages[3])
            draft.write_model()
        finally:
            draft.discard()
        bar.update()
    return Exported(
        draft.path,
        draft.data,
        metadata,
        {i.name: tuple(_dims(i.shape)) for i in graph.graph.inputs},
        Counter(node.op_type for node in graph.graph.all_nodes()),
        outcome,
    )


def checked_opset(opset: int | None, precision: str) -> int:
    """The opset to write. Raises ValueError for a precision or an opset that is not accepted."""
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}; got {precision!r}")
    if opset is None:
        return _OPSET_FOR[precision]
    first, last = _FIRST_OPSET[precision], OPSETS[-1]
    if isinstance(opset, bool) or not isinstance(opset, int) or not first <= opset <= last:
        raise ValueError(f"opset must be in {first} .. {last} for {precision}; got {opset!r}")
    return opset


def _completed(
    source: Source,
    schedule: Schedule | None,
    prediction_type: str | None,
    variance_type: str | None,
) -> Metadata:
    known = source.metadata
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, Schedule.linear() say; got {schedule!r}")
    for name, value, accepted in (
        ("prediction_type", prediction_type, PredictionType),
        ("variance_type", variance_type, VarianceType),
    ):
        if value is not None and value not in get_args(accepted):
            names = ", ".join(get_args(accepted))
            raise ValueError(f"{name} must be one of {names}; got {value!r}")
    return replace(
        known,
        schedule=schedule or known.schedule,
        prediction_type=prediction_type or known.prediction_type,
        variance_type=variance_type or known.variance_type,
    )


def _advance(bar: Any, stage: str) -> None:
    bar.update()
    bar.set_description(stage)


def _dims(shape: Any) -> list[int | str]:
    return [dim if isinstance(dim, int) else str(dim.value) for dim in shape]
