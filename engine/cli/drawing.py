"""``stepfuse sample``: the work."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from stepfuse._version import __version__
from stepfuse.engine.cli.errors import failing_on
from stepfuse.engine.cli.models import choose_device, load_model
from stepfuse.engine.cli.output import Drawn, Target, write
from stepfuse.engine.cli.printing import wrote
from stepfuse.engine.cli.sample_options import SampleOptions
from stepfuse.engine.files.images import check_channels, frame_indices, to_pixels
from stepfuse.engine.generate.conditions.classes import NO_CLASS, Classes
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.step import Step
from stepfuse.kernels.limits import check_memory


def draw_to(target: Target, options: SampleOptions) -> None:
    """Sample what ``options`` ask for, write it to ``target`` and say how fast it was."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = load_model(options.model)
    # of the finished samples in float32 and their pixels; the network comes on top
    check_memory(f"-n {options.count}", 5 * options.count * math.prod(checkpoint.sample_shape))
    checkpoint.model.to(choose_device(options.device))
    if target.needs_pictures:
        check_channels(checkpoint.sample_shape[0])
    labels = choose_labels(options, checkpoint)
    recipe = recipe_of(options).settled(checkpoint)
    sampler = recipe.sampler(checkpoint.model, checkpoint)
    film = Film(checkpoint, len(sampler.timesteps), target.frames)

    start = time.perf_counter()
    x0 = sample(sampler, options, checkpoint, labels, film).cpu()
    seconds = time.perf_counter() - start

    with failing_on(ValueError):
        pixels = to_pixels(checkpoint.decode(x0), low=0)
    classes = checkpoint.num_classes
    drawn = Drawn(
        pixels,
        film.frames(),
        # the null class is none of the classes
        None if labels is None else [-1 if k == classes else k for k in labels.tolist()],
        checkpoint.labels,
        options.first_index,
        settings_of(options, recipe),
    )
    paths = write(target, drawn, options.scale, options.columns)
    wrote(*paths)
    report(paths, sampler, options, checkpoint, seconds)


def choose_labels(options: SampleOptions, checkpoint: Checkpoint) -> Tensor | None:
    """The class of every image, int64 [N], the null class for "none"; None without classes.

    Image k of a seed has the same label in whatever batch or call it is drawn: the labels asked for
    take turns by its number.
    """
    classes = checkpoint.num_classes
    asked = [text for text in options.labels if text != NO_CLASS]
    if options.guidance != 1 and (classes is None or (options.labels and not asked)):
        why = "the model has no classes" if classes is None else "no label is asked for"
        raise ValueError(f"--guidance {options.guidance:g} needs labels to be guided by, but {why}")
    if classes is None:
        if asked:
            raise ValueError(f"--label {asked[0]}: model {options.model!r} has no classes")
        return None
    known = Classes(checkpoint.labels)
    asked_for = [known.number(text, "--label") for text in options.labels]
    chosen = asked_for or list(range(classes))
    turns = torch.arange(options.count).add_(options.first_index % len(chosen)) % len(chosen)
    return torch.tensor(chosen)[turns]


def recipe_of(options: SampleOptions) -> Recipe:
    """How the images are sampled, as far as it is asked for."""
    return Recipe(
        method=options.method,
        steps=options.steps,
        spacing=options.spacing,
        eta=options.eta,
        guidance=options.guidance,
        optimize=options.optimize,  # type: ignore[arg-type]
        backend=options.backend,
        order=options.order,
        solver_type=options.solver_type,
        grid=options.grid,
    )


class Film:
    """Keeps the predicted images of some steps, as pixels.

    Args:
        checkpoint: which makes images of samples.
        steps: of the sampler.
        limit: most frames; 0 keeps nothing. The last is the finished image.
    """

    def __init__(self, checkpoint: Checkpoint, steps: int, limit: int) -> None:
        self.checkpoint = checkpoint
        self.last = steps - 1
        wanted = frame_indices(steps, limit) if limit else []
        self.parts: dict[int, list[Any]] = {index: [] for index in wanted}

    def take(self, step: Step) -> None:
        """Keep this step where it is wanted; batches follow each other."""
        if step.index in self.parts:
            shown = step.x if step.index == self.last else step.x0
            with failing_on(ValueError):
                self.parts[step.index].append(to_pixels(self.checkpoint.decode(shown), low=0))

    def frames(self) -> Any | None:
        """uint8 [F, N, H, W] or [F, N, H, W, C]; None where nothing was wanted."""
        if not self.parts:
            return None
        return np.stack([np.concatenate(parts) for parts in self.parts.values()])


class Rate(ProgressColumn):
    """Finished images per second, from steps of a whole batch."""

    def __init__(self, images_per_step: float) -> None:
        super().__init__()
        self.images_per_step = images_per_step

    def render(self, task: Task) -> Text:
        """The column's text."""
        if not task.speed:
            return Text("")
        return Text(
            f"{task.speed * self.images_per_step:.3g} images/s", style="progress.data.speed"
        )


def sample(
    sampler: Sampler,
    options: SampleOptions,
    checkpoint: Checkpoint,
    labels: Tensor | None,
    film: Film,
) -> Tensor:
    """Sample under a progress bar, which is shown on a terminal only."""
    batches = -(-options.count // (options.batch_size or options.count))
    total = len(sampler.timesteps) * batches
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("sampling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        Rate(options.count / total),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("sampling", total=total)

        def follow(step: Step) -> None:
            film.take(step)
            bar.advance(task)

        return sampler.sample(
            (options.count, *checkpoint.sample_shape),
            seed=options.seed,
            first_index=options.first_index,
            batch_size=options.batch_size,
            condition=None if labels is None else {"labels": labels},
            callback=follow,
        )


def settings_of(options: SampleOptions, recipe: Recipe) -> dict[str, Any]:
    """What decides the images, by the names of the command line."""
    return {
        "stepfuse": __version__,
        "model": options.model,
        "method": recipe.method,
        "steps": recipe.steps,
        "spacing": recipe.spacing,
        "eta": recipe.eta,
        "order": options.order,
        "solver_type": options.solver_type,
        "grid": options.grid,
        "guidance": options.guidance,
        "label": list(options.labels),
        "seed": options.seed,
        "first_index": options.first_index,
        "n": options.count,
    }


def report(
    paths: list[Path],
    sampler: Sampler,
    options: SampleOptions,
    checkpoint: Checkpoint,
    seconds: float,
) -> None:
    """Say on stdout what was written and how fast."""
    _, height, width = checkpoint.sample_shape
    where = f"{sampler.backend} on {sampler.device}"
    if options.optimize != "off":
        where += f", network compiled for {options.optimize}"
    if sampler.device.type == "cpu":
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' if threads > 1 else ''}"
    images = "1 image" if options.count == 1 else f"{options.count} images"
    console = Console(highlight=False)
    line = Text(str(paths[0]), style="bold").append(
        f": {images} of {height}x{width}, {len(sampler.timesteps)} steps, in {seconds:.1f} s: "
        f"{options.count / seconds:.3g} images/s ({where})",
        style="not bold",
    )
    console.print(line, soft_wrap=True)
    for path in paths[1:]:
        text = Text(str(path), style="bold").append(": the way there", style="not bold")
        console.print(text, soft_wrap=True)
