"""What `onnx` and `onnx_loop` share: arguments checked, then traced, compared, written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import nn
from tqdm.auto import tqdm

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.libraries import library
from stepfuse.engine.export.metadata import Metadata
from stepfuse.engine.export.network import DTYPES, Source, describe
from stepfuse.engine.export.to_onnx.graph import CannotExport
from stepfuse.engine.export.to_onnx.write import Draft
from stepfuse.engine.files.writing import check_file
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.update import PredictionType, VarianceType
from stepfuse.kernels.arguments import check_kind, check_literal, check_path
from stepfuse.kernels.checks import as_integer, check_flag, check_word

Precision = Literal["fp32", "fp16", "bf16"]

_LAST_OPSET = 23
# GroupNormalization with float32 statistics came with 21, bfloat16 convolutions with 22
_FIRST_OPSET = {"fp32": 18, "fp16": 21, "bf16": 22}
_USUAL_OPSET = {"fp32": 21, "fp16": 21, "bf16": 22}
_STAGES = ("tracing", "checking", "comparing", "writing")


class FileOptions(TypedDict, total=False):
    """The arguments of `stepfuse.export.onnx` that say what is exported and how."""

    example_inputs: Sequence[Any] | None
    sample_shape: Sequence[int] | None
    schedule: Schedule | None
    prediction_type: PredictionType | None
    variance_type: VarianceType | None
    batch: str | int | BatchProfile
    precision: Precision
    opset: int | None
    external_data: bool | None
    verify: bool
    progress: bool


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


@dataclass(frozen=True)
class Job:
    """A file that can be written: its arguments were accepted, and its folder takes files."""

    path: str | os.PathLike[str]
    source: Source
    metadata: Metadata
    batch: BatchProfile
    precision: str
    opset: int
    external_data: bool | None
    verify: bool
    progress: bool

    def write(self, build: Callable[[], Any], compare: Callable[[Draft], str]) -> Exported:
        """Build the graph, check it, compare it, and give it its name; or leave nothing behind."""
        with tqdm(total=len(_STAGES), unit="stage", disable=not self.progress) as bar:
            bar.set_description(_STAGES[0])
            graph = build()
            _advance(bar, 1)
            draft = Draft(graph, self.path, self.metadata, self.external_data)
            try:
                _advance(bar, 2)
                draft.write_data()
                verified = compare(draft) if self.verify else "no: not asked for"
                if draft.branches and verified.startswith("no:"):
                    raise CannotExport(
                        "the network asks for its batch size: give verify=True, or another batch; "
                        f"compared: {verified}"
                    )
                _advance(bar, 3)
                draft.write_model()
            finally:
                draft.discard()
            bar.update()
        return Exported(
            draft.path,
            draft.data,
            self.metadata,
            {port.name: sizes(port) for port in graph.graph.inputs},
            Counter(node.op_type for node in graph.graph.all_nodes()),
            verified,
        )


def prepare(
    model: nn.Module | Checkpoint,
    path: str | os.PathLike[str],
    example_inputs: Sequence[Any] | None = None,
    sample_shape: Sequence[int] | None = None,
    schedule: Schedule | None = None,
    prediction_type: PredictionType | None = None,
    variance_type: VarianceType | None = None,
    batch: str | int | BatchProfile = "1:8:64",
    precision: Precision = "fp32",
    opset: int | None = None,
    external_data: bool | None = None,
    verify: bool = True,
    progress: bool = False,
) -> Job:
    """Check the arguments of `stepfuse.export.onnx`, whose errors are raised here."""
    check_path("path", path)
    profile = BatchProfile.parse(batch)
    opset = _checked_opset(opset, precision)
    check_flag("verify", verify)
    check_flag("progress", progress)
    if external_data is not None:
        check_flag("external_data", external_data)
    for name in ("onnx", "onnxscript"):
        library(name, "exporting to ONNX")
    check_file(path)
    if schedule is not None:
        check_kind("schedule", schedule, Schedule, "a Schedule, Schedule.linear() say")
    for name, value, accepted in (
        ("prediction_type", prediction_type, PredictionType),
        ("variance_type", variance_type, VarianceType),
    ):
        if value is not None:
            check_literal(name, value, accepted)
    source = describe(model, example_inputs, sample_shape)
    known = source.metadata
    metadata = replace(
        known,
        schedule=schedule or known.schedule,
        prediction_type=prediction_type or known.prediction_type,
        variance_type=variance_type or known.variance_type,
        batch=profile,
        precision=precision,
        opset=opset,
    )
    return Job(path, source, metadata, profile, precision, opset, external_data, verify, progress)


def sizes(value: Any) -> tuple[int | str, ...]:
    """The shape of an ``onnx_ir.Value``, dynamic sizes as words."""
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


def _checked_opset(opset: int | None, precision: str) -> int:
    check_word("precision", precision, DTYPES)
    if opset is None:
        return _USUAL_OPSET[precision]
    first = _FIRST_OPSET[precision]
    number = as_integer("opset", opset, "an int or None")
    if not first <= number <= _LAST_OPSET:
        raise ValueError(f"opset must be in {first} .. {_LAST_OPSET} for {precision}; got {number}")
    return number


def _advance(bar: Any, stage: int) -> None:
    bar.update()
    bar.set_description(_STAGES[stage])
