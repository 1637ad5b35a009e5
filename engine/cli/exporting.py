"""``stepfuse export``: the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from stepfuse.engine.cli.errors import Problem, failing_on
from stepfuse.engine.cli.export_options import ExportOptions
from stepfuse.engine.cli.models import load_model
from stepfuse.engine.cli.printing import wrote
from stepfuse.engine.export.libraries import library
from stepfuse.engine.export.parity.check_file import check
from stepfuse.engine.export.to_onnx.graph import CannotExport
from stepfuse.engine.export.to_onnx.job import Exported
from stepfuse.engine.export.to_onnx.loop_file import onnx_loop
from stepfuse.engine.export.to_onnx.network_file import onnx
from stepfuse.engine.export.to_tensorrt.engine import BuildFailed, tensorrt
from stepfuse.engine.export.to_tensorrt.library import find_library, parse_compute_capabilities
from stepfuse.engine.files.writing import write_file
from stepfuse.engine.generate.recipe import number_or_words
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.sampling.guidance.cfg import CFG


def export_to(options: ExportOptions) -> None:
    """Write the files that ``options`` ask for, compare, and say what comes next."""
    if options.tensorrt is not None:
        # before the minutes that a large network takes
        parse_compute_capabilities(find_library(), options.compute_capability)
    if options.check:
        library("onnxruntime", "--check")
    checkpoint = load_model(options.model)
    console = Console(highlight=False)
    progress = Console(stderr=True).is_terminal
    exported = _export(options, checkpoint, progress)
    _say_onnx(console, options, exported)
    if options.tensorrt is not None:
        _build(console, options, progress)
    if options.check and not options.whole_loop:
        _check(console, options, checkpoint, progress)
    _say_next(console, options, checkpoint)


def _export(options: ExportOptions, checkpoint: Checkpoint, progress: bool) -> Exported:
    shared: dict[str, Any] = {
        "batch": options.batch,
        "precision": options.precision,
        "opset": options.opset,
        "progress": progress,
    }
    with failing_on(CannotExport):
        if not options.whole_loop:
            return onnx(checkpoint, options.out, **shared)
        guided = options.guidance != 1
        if guided and checkpoint.num_classes is None:
            raise ValueError(
                f"--guidance {options.guidance:g} needs labels to be guided by, but model "
                f"{options.model!r} has no classes"
            )
        given = {
            "steps": None if options.steps is None else number_or_words(options.steps),
            **{name: getattr(options, name) for name in ("method", "spacing", "eta")},
        }
        return onnx_loop(
            checkpoint,
            options.out,
            **checkpoint.sampling.with_own(given),
            clip_sample=None if checkpoint.normalization else 1.0,
            order=options.order,
            solver_type=options.solver_type,
            guidance=CFG(options.guidance, unconditional={"labels": None}) if guided else None,
            **shared,
        )


def _build(console: Console, options: ExportOptions, progress: bool) -> None:
    assert options.tensorrt is not None
    with failing_on(BuildFailed):
        info = tensorrt(
            options.out,
            options.tensorrt,
            precision=options.precision,
            batch=options.batch,
            compute_capability=options.compute_capability,
            timing_cache=options.timing_cache,
            progress=progress,
        )
    targets = ", ".join(info.compute_capabilities) or "the library's choice of GPUs"
    _say(
        console,
        options.tensorrt,
        f"{info.library} {info.library_version}, {info.precision}, batch {info.batch}, "
        f"{len(info.layers)} layers, for {targets}",
    )


def _check(
    console: Console, options: ExportOptions, checkpoint: Checkpoint, progress: bool
) -> None:
    report = check(
        checkpoint,
        options.out,
        batch=options.batch,
        tolerance=options.tolerance,
        seed=options.seed,
        progress=progress,
    )
    console.print(report.table())
    for line in report.summary():
        console.print(line, soft_wrap=True)
    if options.report is not None:
        markdown = options.report.suffix.lower() == ".md"
        text = report.markdown() if markdown else report.to_json()
        write_file(options.report, text.encode())
        wrote(options.report)
    if not report.passed:
        where = f"; worst layer {report.worst_layer}" if report.worst_layer else ""
        raise Problem(
            f"{options.out} differs from the reference: {'; '.join(report.failures)}{where}"
        )


def _say_onnx(console: Console, options: ExportOptions, exported: Exported) -> None:
    inputs = ", ".join(
        f"{name} [{', '.join(map(str, shape))}]" for name, shape in exported.inputs.items()
    )
    known = exported.metadata
    _say(console, exported.path, f"{known.precision}, opset {known.opset}, inputs {inputs}")
    if exported.data is not None:
        _say(console, exported.data, "its weights: keep the two together")
    console.print(f"compared: {exported.verified}", soft_wrap=True)


def _say(console: Console, path: Path, what: str) -> None:
    wrote(path)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    line = Text(str(path), style="bold").append(f": {size}, {what}", style="not bold")
    console.print(line, soft_wrap=True)


def _say_next(console: Console, options: ExportOptions, checkpoint: Checkpoint) -> None:
    """A command or two to go on with, in Python."""
    if options.whole_loop:
        console.print(
            f'next: onnxruntime.InferenceSession("{options.out}") takes x_T and gives images',
            soft_wrap=True,
        )
        return
    kind, path = (
        ("OnnxDenoiser", options.out)
        if options.tensorrt is None
        else ("TensorRTDenoiser", options.tensorrt)
    )
    clip = ", clip_sample=None" if checkpoint.normalization else ""
    console.print(
        f'next: model = stepfuse.{kind}("{path}"); '
        f"stepfuse.Sampler(model, model.schedule{clip}).sample(...)",
        soft_wrap=True,
    )
    if not options.check:
        console.print("      --check compares it with the original", soft_wrap=True)
