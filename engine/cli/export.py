"""``stepfuse export``: the options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from stepfuse.engine.cli.errors import choosing_places, interruptible
from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.files.writing import check_file
from stepfuse.kernels.limits import check_seed

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

STEPS, METHOD, SPACING = "50", "ddim", "leading"
WHAT, LOOP, CHECK, RT = "What is exported", "The whole sampler", "Comparison", "TensorRT"
PRECISIONS = ("fp32", "fp16", "bf16")
REPORTS = (".md", ".json")


@dataclass(frozen=True)
class Options:
    """The command line of ``stepfuse export``; raises ValueError for what does not fit together."""

    model: str
    out: Path
    precision: str
    batch: BatchProfile
    opset: int | None
    whole_loop: bool
    steps: str
    method: str
    spacing: str
    eta: float
    guidance: float
    tensorrt: Path | None
    compute_capability: str | None
    timing_cache: Path | None
    check: bool
    tolerance: float | None
    report: Path | None
    seed: int

    def __post_init__(self) -> None:
        if self.out.suffix.lower() != ".onnx":
            raise ValueError(f"--out must end in .onnx; got {str(self.out)!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"--precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}"
            )
        if not math.isfinite(self.guidance):
            raise ValueError(f"--guidance must be a finite number; got {self.guidance}")
        if self.whole_loop:
            unfit = {"--tensorrt": self.tensorrt, "--tolerance": self.tolerance}
            for name, value in {**unfit, "--report": self.report}.items():
                if value is not None:
                    raise ValueError(f"{name} is for a network alone; got --whole-loop too")
        else:
            for option, said, usual in (
                ("--steps", self.steps, STEPS),
                ("--method", self.method, METHOD),
                ("--spacing", self.spacing, SPACING),
                ("--eta", f"{self.eta:g}", "0"),
                ("--guidance", f"{self.guidance:g}", "1"),
            ):
                if said != usual:
                    raise ValueError(f"{option} {said} is part of a sampler; give --whole-loop too")
        if self.tensorrt is None:
            for name, given in (
                ("--compute-capability", self.compute_capability),
                ("--timing-cache", self.timing_cache),
            ):
                if given is not None:
                    raise ValueError(f"{name} needs --tensorrt FILE; got {str(given)!r}")
        if not self.check:
            for name, value in (("--tolerance", self.tolerance), ("--report", self.report)):
                if value is not None:
                    raise ValueError(f"{name} needs --check; got {str(value)!r}")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ValueError(f"--tolerance must be a positive number; got {self.tolerance}")
        if self.report is not None and self.report.suffix.lower() not in REPORTS:
            raise ValueError(
                f"--report must end in {' or '.join(REPORTS)}; got {str(self.report)!r}"
            )
        check_seed("--seed", self.seed)
        paths = [path.resolve() for path in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError(f"two files with one name; got {', '.join(map(str, self.files))}")

    @property
    def files(self) -> list[Path]:
        """Everything that will be written."""
        return [
            path
            for path in (self.out, self.tensorrt, self.timing_cache, self.report)
            if path is not None
        ]


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
    steps: Annotated[
        str, typer.Option(help="As in stepfuse sample.", rich_help_panel=LOOP)
    ] = STEPS,
    method: Annotated[
        str, typer.Option(metavar="ddim|ddpm", help="The sampler.", rich_help_panel=LOOP)
    ] = METHOD,
    spacing: Annotated[
        str,
        typer.Option(
            metavar="leading|trailing|linspace|quadratic",
            help="Which timesteps.",
            rich_help_panel=LOOP,
        ),
    ] = SPACING,
    eta: Annotated[
        float,
        typer.Option(
            help="Noise of ddim; above 0 the noise is an input of the file.", rich_help_panel=LOOP
        ),
    ] = 0.0,
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
    options = Options(
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
