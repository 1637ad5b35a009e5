"""``stepfuse generate``: the command, and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepfuse.engine.cli import generate_look as look
from stepfuse.engine.cli import generating
from stepfuse.engine.cli.solver_options import (
    grid_option,
    method_option,
    order_option,
    solver_type_option,
    spacing_option,
)
from stepfuse.engine.cli.usual import device_option, usual
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.run import How
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.slices import parse

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "Fifty thousand digits, one network per core:\n\n"
    "  [cyan]stepfuse generate --model digits -n 50000 --seed 0 --out run/[/cyan]\n\n"
    "Go on after Ctrl-C, a crash or a requeue; everything is in run/job.json:\n\n"
    "  [cyan]stepfuse generate run/[/cyan]\n\n"
    "How far it is; whether every image is what it should be; one file for the ADM evaluator:\n\n"
    "  [cyan]stepfuse generate status run/[/cyan]\n\n"
    "  [cyan]stepfuse generate verify run/ -k 64[/cyan]\n\n"
    "  [cyan]stepfuse generate merge run/ --npz samples.npz[/cyan]\n\n"
    "One task of a SLURM array, of which each makes its own shards:\n\n"
    "  [cyan]stepfuse generate run/ --shard auto[/cyan]\n\n"
    "Captions and seeds from a table, pictures for training in tar files:\n\n"
    "  [cyan]stepfuse generate -n 20000 --conditions rows.csv --format webdataset "
    "--out set/[/cyan]\n\n"
    "[bold]Also[/bold]  status, verify, merge, stats: stepfuse generate status --help"
)

# first words that are commands of their own; a folder of that name is ./status
COMMANDS = {
    "status": look.status_command,
    "verify": look.verify_command,
    "merge": look.merge_command,
    "stats": look.stats_command,
}

MADE, WRITTEN, RUN, MACHINE = "What is made", "What is written", "Who makes it", "How it runs"


def generate_command(
    context: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(
            help="Folder or URL of a job that is there: goes on with it, with all its settings.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Embedded checkpoint, the path of a .safetensors file, or module:function that "
            "returns a Checkpoint.",
            rich_help_panel=MADE,
        ),
    ] = "digits",
    count: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--count",
            help="Images in all, from number 0 on. May be raised later.",
            rich_help_panel=MADE,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Image k of a seed is always the same.", rich_help_panel=MADE)
    ] = 0,
    steps: Annotated[
        str | None, usual("As in stepfuse sample: a number, 'ddim25', '10,15'.", MADE)
    ] = None,
    method: Annotated[str | None, method_option(MADE)] = None,
    eta: Annotated[float | None, usual("Noise of ddim: 0 to 1.", MADE)] = None,
    spacing: Annotated[str | None, spacing_option(MADE)] = None,
    order: Annotated[int | None, order_option(MADE)] = None,
    solver_type: Annotated[str | None, solver_type_option(MADE)] = None,
    grid: Annotated[str | None, grid_option(MADE)] = None,
    guidance: Annotated[
        float,
        typer.Option(help="Classifier-free guidance; 1 is none.", rich_help_panel=MADE),
    ] = 1.0,
    labels: Annotated[
        str,
        typer.Option(
            metavar="turn|random",
            help="All classes take turns, or are drawn uniformly by seed and number.",
            rich_help_panel=MADE,
        ),
    ] = "turn",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="CLASS",
            help="These classes take turns, by name or number; 'none' for no class.",
            rich_help_panel=MADE,
        ),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(
            help="That many images of a class, then of the next.",
            rich_help_panel=MADE,
            show_default=False,
        ),
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv|jsonl|parquet",
            help="A row per image: columns label, seed, guidance; others are written beside it.",
            rich_help_panel=MADE,
            show_default=False,
        ),
    ] = None,
    per_row: Annotated[
        int | None,
        typer.Option(help="Images of each row.", rich_help_panel=MADE, show_default=False),
    ] = None,
    optimize: Annotated[
        str,
        typer.Option(
            metavar="off|float32|bfloat16",
            help="Compile the network; its choices are recorded once, in plan.json.",
            rich_help_panel=MADE,
        ),
    ] = "off",
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images at a time, always; part of what is made. Default: by a short trial.",
            rich_help_panel=MADE,
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of a worker; part of what is made: sums have an order. Default: 1.",
            rich_help_panel=MADE,
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder, or URL that fsspec knows. Default: MODEL-run.",
            rich_help_panel=WRITTEN,
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="webdataset|npz|png|webp|jpeg|parquet|npy",
            help="Of a shard. Default: tar files of webdataset above 10,000 images, else folders.",
            rich_help_panel=WRITTEN,
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        str,
        typer.Option(
            metavar="png|webp|jpeg",
            help="Pictures inside tar and Parquet files.",
            rich_help_panel=WRITTEN,
        ),
    ] = "png",
    quality: Annotated[int, typer.Option(help="Of JPEG, 1 to 100.", rich_help_panel=WRITTEN)] = 95,
    level: Annotated[
        int | None,
        typer.Option(
            help="How hard PNG (0 to 9) and WebP (0 to 6) try to be small.",
            rich_help_panel=WRITTEN,
            show_default=False,
        ),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            metavar="nearest|truncate",
            help="To grey levels; guided-diffusion truncates.",
            rich_help_panel=WRITTEN,
        ),
    ] = "nearest",
    shard_size: Annotated[
        int | None,
        typer.Option(
            help="Images of a shard, a multiple of the batch size. Default: some minutes' worth.",
            rich_help_panel=WRITTEN,
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Features of uint8 [N, C, H, W], whose sums stepfuse generate stats reads.",
            rich_help_panel=WRITTEN,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes. Default: one per core, or per GPU, as memory allows.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="processes|ray", help="Local processes, or a Ray cluster.", rich_help_panel=RUN
        ),
    ] = "processes",
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster; 'auto' for that of this machine.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N|auto",
            help="Make every N-th shard only; auto reads SLURM's, AWS Batch's, Kubernetes' or "
            "torchrun's variables.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    steal: Annotated[
        bool,
        typer.Option(
            "--steal", help="Then the shards of others that nobody is at.", rich_help_panel=RUN
        ),
    ] = False,
    device: Annotated[str, device_option(MACHINE)] = "auto",
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="That one worker may take while batch sizes are tried. Default: its share.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds for the shards at hand once SIGTERM or SIGUSR1 has come.",
            rich_help_panel=MACHINE,
        ),
    ] = 30.0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only the trial: images per second, hours, GB, shards.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            help="With --dry-run: of this machine.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    log_json: Annotated[
        str | None,
        typer.Option(
            "--log-json",
            metavar="FILE|-",
            help="One JSON object per event.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.prom",
            help="For node_exporter's textfile collector.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    records_only: Annotated[
        bool,
        typer.Option(
            "--records-only",
            help="Trust the records of shards that were moved away.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Begin although the disk seems too small.", rich_help_panel=MACHINE
        ),
    ] = False,
    allow_other_isa: Annotated[
        bool,
        typer.Option(
            "--allow-other-isa",
            help="Go on where instruction set, torch or stepfuse are not those of the job.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
) -> int:
    """Make any number of images from one seed, resumably, on one machine or many.

    Image k depends on weights, settings, seed, k and row k of the conditions alone; its bytes do
    not depend on who makes it. Shards appear whole or not at all: kill this at any moment, and the
    same command goes on.

    Exit status: 0 complete, 2 a value that is not accepted or another job in the folder, 3 complete
    but for shards that failed three times, 4 verify found a difference, 74 disk full or not to be
    written, 75 preempted (run it again), 130 Ctrl-C, 1 anything else.
    """
    how = How(
        engine=engine,
        workers=workers,
        slice=None if shard is None else parse(shard),
        steal=steal,
        grace=grace,
        records_only=records_only,
        force=force,
        allow_other_isa=allow_other_isa,
        address=address,
        device=device,
    )
    watch = generating.Watch(log_json, metrics)
    if run is not None:
        generating.refuse_given(context)
        return generating.resume(run, count, how, watch)
    if count is None:
        raise ValueError("-n must say how many images are wanted, or RUN which job is to go on")
    sampled = (method, steps, spacing, eta, guidance, optimize, "auto", order, solver_type, grid)
    settings = Settings(
        model=model,
        recipe=Recipe(*sampled),  # type: ignore[arg-type]
        seed=seed,
        labels=labels,
        label=tuple(label or ()),
        per_class=per_class,
        conditions=None if conditions is None else str(conditions),
        per_row=per_row,
        format=format,
        image=image,
        quality=quality,
        level=level,
        rounding=rounding,  # type: ignore[arg-type]
        features=features,
        batch_size=batch_size,
        shard_size=shard_size,
        threads=threads,
        device=device,
    )
    generating.check_price(price_per_hour, dry_run)
    if dry_run:
        return generating.estimate(settings, count, out, workers, memory, price_per_hour)
    where = f"{Path(model.replace(':', '-')).stem}-run" if out is None else out
    return generating.begin(settings, count, where, how, watch, memory)
