"""``stepfuse likelihood``: the command, and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stepfuse.engine.cli.errors import USAGE, choosing_places, failing_on, interruptible
from stepfuse.engine.cli.likelihood_options import (
    CDFS,
    LABELS,
    SPACINGS,
    VARIANCES,
    LikelihoodOptions,
)
from stepfuse.engine.cli.usual import backend_option, device_option, model_option, threads_option
from stepfuse.engine.files.writing import check_file

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "How many bits an image costs under the digits, as a picture:\n\n"
    "  [cyan]stepfuse likelihood test.npz --out curve.png[/cyan]\n\n"
    "A page with the numbers, of 200 images, over every tenth timestep:\n\n"
    "  [cyan]stepfuse likelihood test.npz -n 200 --steps 100 --out curve.html[/cyan]\n\n"
    "Every number, of a network of your own, as guided-diffusion computes it:\n\n"
    "  [cyan]stepfuse likelihood images/ --model run/model.safetensors --cdf tanh "
    "--out bits.json[/cyan]"
)
MEASURED, WRITING, MACHINE = "What is measured", "What is written", "How it runs"


def likelihood_command(
    data: Annotated[
        Path,
        typer.Argument(
            help="Images of the model's size, 8 bits: a folder, of one folder per class, or .npz "
            "with 'images' uint8 [N, H, W(, C)] and optional 'labels'."
        ),
    ],
    model: Annotated[str, model_option(MEASURED)] = "digits",
    count: Annotated[
        int,
        typer.Option(
            "-n",
            "--count",
            help="Images, evenly spaced over the data; all where there are fewer.",
            rich_help_panel=MEASURED,
        ),
    ] = 50,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Of the chain, as in stepfuse sample; the bound of a shorter chain is another "
            "one. Default: every timestep.",
            rich_help_panel=MEASURED,
            show_default=False,
        ),
    ] = None,
    spacing: Annotated[
        str,
        typer.Option(
            metavar="|".join(SPACINGS),
            help="Which timesteps.",
            rich_help_panel=MEASURED,
        ),
    ] = "leading",
    variance: Annotated[
        str,
        typer.Option(
            metavar="|".join(VARIANCES),
            help="Of the reverse steps; auto is the model's own, or fixed_large.",
            rich_help_panel=MEASURED,
        ),
    ] = "auto",
    cdf: Annotated[
        str,
        typer.Option(
            metavar="|".join(CDFS),
            help="Of the decoder's bins; tanh is guided-diffusion's approximation.",
            rich_help_panel=MEASURED,
        ),
    ] = "exact",
    labels: Annotated[
        str,
        typer.Option(
            metavar="|".join(LABELS),
            help="Classes of the images: those of the data, by name, or none.",
            rich_help_panel=MEASURED,
        ),
    ] = "data",
    seed: Annotated[int, typer.Option(help="Of the noise.", rich_help_panel=MEASURED)] = 0,
    background: Annotated[
        Literal["white", "black"],
        typer.Option(help="What transparent pictures are laid on.", rich_help_panel=MEASURED),
    ] = "white",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="NAME.png: curves, and the images after 0.1, 1, 10, 30 and 100 % of the bits. "
            "NAME.html: the same with a table. NAME.json: every number. Default: print only.",
            rich_help_panel=WRITING,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(help="Pairs of an image and a timestep at a time.", rich_help_panel=MACHINE),
    ] = 32,
    optimize: Annotated[
        str,
        typer.Option(
            metavar="off|float32|bfloat16",
            help="Compile the network first, for this type of matrix product.",
            rich_help_panel=MACHINE,
        ),
    ] = "float32",
    backend: Annotated[str, backend_option(MACHINE, "the noising")] = "auto",
    device: Annotated[str, device_option(MACHINE)] = "auto",
    threads: Annotated[int | None, threads_option(MACHINE)] = None,
) -> None:
    """Bound how many bits images cost under a model: bits/dim, and what is known after how many."""
    options = LikelihoodOptions(
        data,
        model,
        count,
        steps,
        spacing,
        variance,
        cdf,
        labels,
        seed,
        background,
        out,
        batch_size,
        optimize,
        backend,
        device,
        threads,
    )
    if out is not None:
        with choosing_places():
            check_file(out)
    with (
        interruptible("nothing was written", options.less_memory),
        failing_on(FileNotFoundError, status=USAGE),
    ):
        from stepfuse.engine.cli.bounding import bound_to

        bound_to(options)
