"""``stepfuse bench``: the options; the work is imported when they have been read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepfuse.engine.sampling.plain_loop import METHODS

WHAT, PEERS, HOW, OUTPUT = "What is run", "Against whom", "How it is measured", "What is written"

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "A first look, in a minute or two:\n\n"
    "  [cyan]stepfuse bench --quick --against diffusers[/cyan]\n\n"
    "The embedded model against everything that is installed, bfloat16 too:\n\n"
    "  [cyan]stepfuse bench --model digits --against all --dtype bf16[/cyan]\n\n"
    "A network of your own, with the settings you sample with:\n\n"
    "  [cyan]stepfuse bench --model run/model.safetensors --method ddpm --steps 250 "
    "--batch 1,16 --against diffusers,openvino[/cyan]\n\n"
    "Did a change make it faster?\n\n"
    "  [cyan]stepfuse bench --out before[/cyan], change something, "
    "[cyan]stepfuse bench --out after[/cyan],\n\n"
    "  [cyan]stepfuse bench --compare before/record.json after/record.json[/cyan]\n\n"
    "What the GPU kernels need, without a GPU:\n\n"
    "  [cyan]stepfuse bench --static[/cyan]"
)

STEPS, BATCH, ROUNDS, TIME_LIMIT, PROCESSES = 50, "1,8,32", 15, 300.0, 3
QUICK = {"steps": 10, "batch": "1", "rounds": 5, "time_limit": 30.0, "processes": 1}


def bench(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Embedded checkpoint, the path of a .safetensors file, or ddpm-cifar: a network "
            "of diffusers in the size of DDPM's for CIFAR-10 (35.7 M), with random weights.",
            rich_help_panel=WHAT,
        ),
    ] = "digits",
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"Evaluations of the network per image. Default: {STEPS}.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(metavar="|".join(METHODS), help="The sampler.", rich_help_panel=WHAT),
    ] = "ddim",
    eta: Annotated[
        float,
        typer.Option(help="Noise of ddim: 0 is deterministic, 1 is DDPM's.", rich_help_panel=WHAT),
    ] = 0.0,
    spacing: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Which timesteps: leading, trailing, linspace or quadratic.",
            rich_help_panel=WHAT,
        ),
    ] = "leading",
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help=f"Batch sizes. Cold start, memory, energy and the split of time are those of the "
            f"first. Default: {BATCH}.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="fp32|bf16",
            help="bf16 adds the bfloat16 variants, ours and theirs, beside float32.",
            rich_help_panel=WHAT,
        ),
    ] = "fp32",
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of our update: auto, reference, cpp or triton; stepfuse doctor lists what runs "
            "here.",
            rich_help_panel=WHAT,
        ),
    ] = "auto",
    graph: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What our sampler captures: auto, step, loop or none.",
            rich_help_panel=WHAT,
        ),
    ] = "auto",
    optimize: Annotated[
        bool,
        typer.Option(
            "--optimize/--no-optimize",
            help="Compile the network for our sampler.",
            rich_help_panel=WHAT,
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of x_T and the noise.", rich_help_panel=WHAT)] = 0,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto, cpu or cuda; auto is cuda where there is one.",
            rich_help_panel=WHAT,
        ),
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of every candidate. Default: PyTorch's choice.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Of diffusers, compile (torch.compile), onnxruntime, openvino; or all, or none. "
            "One that is not installed is named, and the others run. compile takes minutes.",
            rich_help_panel=PEERS,
        ),
    ] = "none",
    rounds: Annotated[
        int | None,
        typer.Option(
            help=f"Times of each figure; candidates take turns. Default: {ROUNDS}.",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="For all rounds together; ends figures early, not before their third round. "
            "Building, verifying and cold starts come on top. 0 is no limit. "
            f"Default: {TIME_LIMIT:g}.",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    busy: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="So many processes compute without end beside every candidate while it is timed: "
            "how much a shared machine costs. Compare with a run without.",
            rich_help_panel=HOW,
        ),
    ] = 0,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold/--no-cold",
            help="Cold start and peak memory, in new processes.",
            rich_help_panel=HOW,
        ),
    ] = True,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A minute or two: 10 steps, batch 1, 5 rounds, one cold start each; what is given "
            "beside it holds.",
            rich_help_panel=HOW,
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for record.json, report.md and report.html; those of an earlier run are "
            "replaced.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("stepfuse-bench"),
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write the record, with every sample, to this file instead.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            "--markdown", help="Write the tables to this file instead.", rich_help_panel=OUTPUT
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", help="Write the report to this file instead.", rich_help_panel=OUTPUT
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="A.json B.json",
            help="Measure nothing: show what changed between two records beyond their spread.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="Measure nothing: compile the Triton kernels for four GPUs and list what they "
            "need and what memory bandwidth allows, in roofline.json; later reports in the same "
            "folder show it too.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> None:
    """Time whole sampling loops on this machine, ours beside other libraries'.

    Every candidate makes the same images, which are compared with those of
    the plain float32 loop first: one whose images are wrong is named and gets
    no time. Then candidates take turns, round by round, so that whatever else
    the machine does meets them all.

    You get latency (median, p95, p99 per image and per step), throughput over
    batch sizes, cold start, peak memory, energy where the machine counts it,
    and where the time goes. Close other programs first, and plug the machine
    in. Ctrl-C keeps what has been measured.
    """
    from stepfuse.bench import running

    if compare is not None and static:
        raise ValueError("--compare and --static are commands of their own; got both")
    if compare is not None:
        running.show_comparison(*compare)
        return
    targets = running.Targets.of(out, json, markdown, html, static)
    if static:
        running.static(targets)
        return
    defaults = dict(zip(QUICK, (STEPS, BATCH, ROUNDS, TIME_LIMIT, PROCESSES), strict=True))
    usual = QUICK if quick else defaults
    running.run(
        spec={
            "model": model,
            "steps": usual["steps"] if steps is None else steps,
            "method": method,
            "eta": eta,
            "spacing": spacing,
            "seed": seed,
            "backend": backend,
            "graph": graph,
            "optimize": optimize,
            "device": device,
            "threads": threads,
        },
        batch=str(usual["batch"]) if batch is None else batch,
        dtype=dtype,
        against=against,
        rounds=int(str(usual["rounds"])) if rounds is None else rounds,
        time_limit=float(str(usual["time_limit"])) if time_limit is None else time_limit,
        processes=int(str(usual["processes"])) if cold else 0,
        busy=busy,
        targets=targets,
    )
