"""``stepfuse restore``: the command, and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepfuse.engine.cli.errors import USAGE, choosing_places, failing_on, interruptible
from stepfuse.engine.cli.restore_options import METHODS, TASKS, WEIGHTS, RestoreOptions
from stepfuse.engine.cli.usual import backend_option, device_option, model_option, threads_option
from stepfuse.engine.files.writing import check_file

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "Images of the model, measured and restored, with what was lost and found:\n\n"
    "  [cyan]stepfuse restore --task tomography --angles 12 --demo[/cyan]\n\n"
    "A picture with a hole, four ways to fill it, and where they differ:\n\n"
    "  [cyan]stepfuse restore broken.png --task inpaint --mask hole.png -n 4 --std std.png "
    "--out filled.png[/cyan]\n\n"
    "A picture of a quarter of the size, by the other method:\n\n"
    "  [cyan]stepfuse restore small.png --task sr --factor 4 --method dps --scale 2[/cyan]"
)
MEASURED, FOUND, WRITING, MACHINE = (
    "What was measured", "How it is found", "What is written", "How it runs",
)  # fmt: skip


def restore_command(
    task: Annotated[
        str,
        typer.Option(
            metavar="|".join(TASKS),
            help="What happened to the image: pixels are missing, the outside is, it is a smaller "
            "one, it is blurred, or it is known by its projections.",
            rich_help_panel=MEASURED,
        ),
    ],
    picture: Annotated[
        Path | None,
        typer.Argument(
            help="What was measured, as a picture; with --demo, the image itself. For tomography "
            "the projections: a row for each angle, white where the sum is that of a white side.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="Measure the picture, or images that the model draws, and write a strip: the "
            "image, what is left, its pseudo-inverse, what is found, with PSNR.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    images: Annotated[
        int | None,
        typer.Option(
            help="Images of a demo. Default: 4.", rich_help_panel=MEASURED, show_default=False
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="inpaint: a picture of the model's size, white where pixels are missing. Default "
            "in a demo: a box in the middle.",
            rich_help_panel=MEASURED,
            show_default=False,
        ),
    ] = None,
    pad: Annotated[
        int | None,
        typer.Option(
            help="outpaint: width of the border that is missing. Default: a quarter of the side.",
            rich_help_panel=MEASURED,
            show_default=False,
        ),
    ] = None,
    factor: Annotated[
        int | None,
        typer.Option(
            help="sr: pixels of the image in one of the picture, each way. Default: 4.",
            rich_help_panel=MEASURED,
            show_default=False,
        ),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="blur: standard deviation of the Gaussian, in pixels. Default: 2.",
            rich_help_panel=MEASURED,
            show_default=False,
        ),
    ] = None,
    angles: Annotated[
        int | None,
        typer.Option(
            help="tomography: projections over 180 degrees. Default: 12.",
            rich_help_panel=MEASURED,
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(
            help="Standard deviation of the noise in the measurement, of values in [-1, 1]; for "
            "tomography of projections with |A| = 1.",
            rich_help_panel=MEASURED,
        ),
    ] = 0.05,
    model: Annotated[str, model_option(FOUND)] = "digits",
    method: Annotated[
        str,
        typer.Option(metavar="|".join(METHODS), help="Of guidance.", rich_help_panel=FOUND),
    ] = "pigdm",
    weight: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(WEIGHTS),
            help="pigdm: score samples the posterior, paper comes nearer to its middle. Default: "
            "score.",
            rich_help_panel=FOUND,
            show_default=False,
        ),
    ] = None,
    data_std: Annotated[
        float | None,
        typer.Option(
            help="pigdm: standard deviation of the data. Default: 0.6.",
            rich_help_panel=FOUND,
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="dps: length of a step towards the measurement. Default: 1.",
            rich_help_panel=FOUND,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        str, typer.Option(help="As in stepfuse sample.", rich_help_panel=FOUND)
    ] = "50",
    eta: Annotated[
        float, typer.Option(help="Noise of the steps: 0 is none.", rich_help_panel=FOUND)
    ] = 1.0,
    label: Annotated[
        str | None,
        typer.Option(
            "--label",
            "-l",
            metavar="CLASS",
            help="Class of the image, by name or number. Default: it is not known.",
            rich_help_panel=FOUND,
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float,
        typer.Option(
            help="Classifier-free guidance towards the label; 1 is none.", rich_help_panel=FOUND
        ),
    ] = 1.0,
    count: Annotated[
        int,
        typer.Option(
            "-n",
            "--count",
            help="Samples of the posterior for each picture.",
            rich_help_panel=WRITING,
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples.", rich_help_panel=WRITING)] = 0,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The picture, NAME.png.", rich_help_panel=WRITING),
    ] = Path("restored.png"),
    std: Annotated[
        Path | None,
        typer.Option(
            help="NAME.png: standard deviation of the samples, pixel by pixel; white is half of "
            "the range.",
            rich_help_panel=WRITING,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Samples at a time.", rich_help_panel=MACHINE)
    ] = 16,
    backend: Annotated[str, backend_option(MACHINE, "the fused update")] = "auto",
    device: Annotated[str, device_option(MACHINE)] = "auto",
    threads: Annotated[int | None, threads_option(MACHINE)] = None,
) -> None:
    """Restore a picture from what was measured of it, with a diffusion model as the prior."""
    options = RestoreOptions(
        picture,
        task,
        demo,
        images,
        mask,
        pad,
        factor,
        sigma,
        angles,
        noise,
        model,
        method,
        weight,
        data_std,
        scale,
        steps,
        eta,
        label,
        guidance,
        count,
        seed,
        out,
        std,
        batch_size,
        backend,
        device,
        threads,
    )
    with choosing_places():
        check_file(out)
        if std is not None:
            check_file(std)
    with (
        interruptible("no file was left half-written", options.less_memory),
        failing_on(FileNotFoundError, status=USAGE),
    ):
        from stepfuse.engine.cli.restoring import restore_to

        restore_to(options)
