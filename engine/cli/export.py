"""``stepfuse export``: the command, and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepfuse.engine.cli.errors import choosing_places, interruptible
from stepfuse.engine.cli.export_options import ExportOptions
from stepfuse.engine.cli.solver_options import (
    method_option,
    order_option,
    solver_type_option,
    spacing_option,
)
from stepfuse.engine.cli.usual import usual
from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.files.writing import check_file

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "The network as ONNX, for any runtime, compared with the original:\n\n"
    "  [cyan]stepfuse export --model digits --out unet.onnx --check[/cyan]\n\n"
    "A TensorRT engine in half precision, built here for GPUs that need not be here:\n\n"
    "  [cyan]stepfuse export -m digits -o unet.onnx --precision fp16 --tensorrt unet.engine "
    "--compute-capability sm_89,sm_120[/cyan]\n\n"
    "The whole sampler in one file, noise in, images out, for a service without Python:\n\n"
    "  [cyan]stepfuse export -m digits -o sampler.onnx --whole-loop --steps 50 --guidance 2[/cyan]"
)

WHAT, LOOP, CHECK, RT = "What is exported", "The whole sampler", "Comparison", "TensorRT"


def export_command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="What to export: an embedded checkpoint, or the path of a .safetensors file.",
            rich_help_panel=WHAT,
        ),
    ] = "digits",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="NAME.onnx. Default: MODEL.onnx.", rich_help_panel=WHAT),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|fp16|bf16",
            help="Of weights and arithmetic; inputs and outputs stay float32, and so do the "
            "statistics of norms.",
            rich_help_panel=WHAT,
        ),
    ] = "fp32",
    batch: Annotated[
        str,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Batch sizes: the smallest, the most frequent, the largest. One number fixes it.",
            rich_help_panel=WHAT,
        ),
    ] = "1:8:64",
    opset: Annotated[
        int | None,
        typer.Option(
            help="Of the ONNX file. Default: 21, and 22 for bf16.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    whole_loop: Annotated[
        bool,
        typer.Option(
            "--whole-loop",
            help="Export network and sampling loop as one model: noise in, images out.",
            rich_help_panel=LOOP,
        ),
    ] = False,
    steps: Annotated[str | None, usual("As in stepfuse sample.", LOOP)] = None,
    method: Annotated[str | None, method_option(LOOP)] = None,
    spacing: Annotated[str | None, spacing_option(LOOP)] = None,
    order: Annotated[int | None, order_option(LOOP)] = None,
    solver_type: Annotated[str | None, solver_type_option(LOOP)] = None,
    eta: Annotated[
        float | None, usual("Noise of ddim; above 0 the noise is an input of the file.", LOOP)
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance; 1 is none.", rich_help_panel=LOOP)
    ] = 1.0,
    tensorrt: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also build a TensorRT engine. TensorRT-RTX builds without a GPU.",
            rich_help_panel=RT,
            show_default=False,
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            metavar="sm_89,...",
            help="GPUs to build for (TensorRT-RTX). Default: the library's choice.",
            rich_help_panel=RT,
            show_default=False,
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Times of kernels, kept from build to build (TensorRT).",
            rich_help_panel=RT,
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare the file with the network in plain PyTorch, float64: random and real "
            "inputs, all timesteps, 50 steps of DDIM. Exit status 1 where it differs.",
            rich_help_panel=CHECK,
        ),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative L2 error of a prediction. Default: by precision.",
            rich_help_panel=CHECK,
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the comparison: NAME.md or NAME.json.",
            rich_help_panel=CHECK,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of its inputs.", rich_help_panel=CHECK)] = 0,
) -> None:
    """Write a network as ONNX or TensorRT, and check it against the reference."""
    options = ExportOptions(
        model=model,
        out=Path(f"{Path(model).stem}.onnx") if out is None else out,
        precision=precision,
        batch=BatchProfile.parse(batch),
        opset=opset,
        whole_loop=whole_loop,
        steps=steps,
        method=method,
        spacing=spacing,
        eta=eta,
        order=order,
        solver_type=solver_type,
        guidance=guidance,
        tensorrt=tensorrt,
        compute_capability=compute_capability,
        timing_cache=timing_cache,
        check=check,
        tolerance=tolerance,
        report=report,
        seed=seed,
    )
    with choosing_places():
        for path in options.files:
            check_file(path)
    less = "smaller batches need less (--batch)" if options.batch.maximum > 1 else ""
    with interruptible("no file was left half-written", less):
        from stepfuse.engine.cli.exporting import export_to

        export_to(options)
