"""``stepfuse sample``: the command, and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepfuse.engine.cli.errors import choosing_places, interruptible
from stepfuse.engine.cli.output import Target
from stepfuse.engine.cli.sample_options import SampleOptions
from stepfuse.engine.cli.solver_options import (
    grid_option,
    method_option,
    order_option,
    solver_type_option,
    spacing_option,
)
from stepfuse.engine.cli.usual import (
    backend_option,
    device_option,
    model_option,
    threads_option,
    usual,
)

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "64 digits in one picture:\n\n"
    "  [cyan]stepfuse sample --out digits.png[/cyan]\n\n"
    "Sixteen threes, fast, with guidance:\n\n"
    "  [cyan]stepfuse sample -n 16 --label 3 --steps 20 --guidance 2 --out threes.png[/cyan]\n\n"
    "The same in a quarter of the evaluations, by a solver of higher order:\n\n"
    "  [cyan]stepfuse sample --method unipc --steps 12 --spacing trailing -o digits.png[/cyan]\n\n"
    "How they come out of the noise:\n\n"
    "  [cyan]stepfuse sample -n 25 --out digits.gif[/cyan]\n\n"
    "Images 10000 to 19999 of seed 0 as an array, 250 at a time:\n\n"
    "  [cyan]stepfuse sample -n 10000 --first-index 10000 --batch-size 250 --out b.npz[/cyan]\n\n"
    "DDPM's ancestral sampling with a network of your own, one PNG per image:\n\n"
    "  [cyan]stepfuse sample --model run/model.safetensors --method ddpm --steps 1000 "
    "--out images/[/cyan]"
)

SAMPLING, WRITING, MACHINE = "What is drawn", "What is written", "How it runs"


def sample(
    model: Annotated[str, model_option(SAMPLING)] = "digits",
    count: Annotated[
        int, typer.Option("-n", "--count", help="Number of images.", rich_help_panel=SAMPLING)
    ] = 64,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="CLASS",
            help="Class, by name or number, or 'none' for no class. Give it several times to take "
            "turns; default: all classes take turns.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    steps: Annotated[
        str | None,
        usual(
            "Evaluations per image, up to the model's training steps; or timesteps in "
            "guided-diffusion's words: 'ddim25', '10,15,20'.",
            SAMPLING,
        ),
    ] = None,
    method: Annotated[str | None, method_option(SAMPLING)] = None,
    eta: Annotated[
        float | None, usual("Noise of ddim: 0 is deterministic, 1 as much as DDPM.", SAMPLING)
    ] = None,
    spacing: Annotated[str | None, spacing_option(SAMPLING)] = None,
    order: Annotated[int | None, order_option(SAMPLING)] = None,
    solver_type: Annotated[str | None, solver_type_option(SAMPLING)] = None,
    grid: Annotated[str | None, grid_option(SAMPLING)] = None,
    guidance: Annotated[
        float,
        typer.Option(
            help="Classifier-free guidance; 1 is none, more is closer to the label and takes twice "
            "the time.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Image k of a seed is always the same.", rich_help_panel=SAMPLING)
    ] = 0,
    first_index: Annotated[
        int,
        typer.Option(help="Number k of the first image, to continue.", rich_help_panel=SAMPLING),
    ] = 0,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="NAME.png: all images in a grid. NAME.npz: arrays images, labels, settings. "
            "NAME.gif: the trajectory. NAME/: a folder, one PNG per image. Default: MODEL.png.",
            rich_help_panel=WRITING,
        ),
    ] = None,
    trajectory: Annotated[
        bool,
        typer.Option(
            "--trajectory",
            help="Also draw the predicted images of ten steps, as a film strip: "
            "NAME-trajectory.png. (A GIF is --out NAME.gif.)",
            rich_help_panel=WRITING,
        ),
    ] = False,
    scale: Annotated[
        int | None,
        typer.Option(
            help="Enlarge pixels 1 to 8 times. Default: small images in grids are enlarged.",
            rich_help_panel=WRITING,
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        int | None,
        typer.Option(
            help="Images in a row of the grid. Default: a square.",
            rich_help_panel=WRITING,
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace a folder that holds nothing but .png files.",
            rich_help_panel=WRITING,
        ),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images at a time; bounds the memory. Default: all.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    backend: Annotated[str, backend_option(MACHINE, "the fused update")] = "auto",
    optimize: Annotated[
        str,
        typer.Option(
            metavar="off|float32|bfloat16",
            help="Compile the network first, for this type of matrix product: takes seconds, then "
            "images come faster, equal to rounding.",
            rich_help_panel=MACHINE,
        ),
    ] = "off",
    device: Annotated[str, device_option(MACHINE)] = "auto",
    threads: Annotated[int | None, threads_option(MACHINE)] = None,
) -> None:
    """Draw images: a grid, an array, a folder or an animation.

    The same command gives the same images, in whatever batches they are drawn.
    """
    options = SampleOptions(
        model,
        count,
        steps,
        method,
        spacing,
        eta,
        order,
        solver_type,
        grid,
        guidance,
        tuple(label or ()),
        seed,
        first_index,
        batch_size,
        backend,
        optimize,
        device,
        threads,
        scale,
        columns,
    )
    target = Target.parse(f"{Path(model).stem}.png" if out is None else out, trajectory, force)
    with choosing_places():
        target.check()
    with interruptible("no file was left half-written", options.less_memory):
        from stepfuse.engine.cli.drawing import draw_to

        draw_to(target, options)
