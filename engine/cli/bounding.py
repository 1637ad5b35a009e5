"""``stepfuse likelihood``: the work."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from stepfuse._version import __version__
from stepfuse.engine.cli.errors import Problem
from stepfuse.engine.cli.likelihood_options import LikelihoodOptions
from stepfuse.engine.cli.likelihood_output import Measured, write
from stepfuse.engine.cli.models import choose_device, load_model
from stepfuse.engine.cli.printing import wrote
from stepfuse.engine.files.images import check_channels
from stepfuse.engine.generate.conditions.classes import Classes
from stepfuse.engine.generate.recipe import compiled_for, number_or_words
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.sampling.bound.api import too_much
from stepfuse.engine.sampling.bound.bounding import Bounding
from stepfuse.engine.sampling.bound.result import Bound
from stepfuse.engine.sampling.timesteps import spaced_timesteps
from stepfuse.engine.training.data import ImageData, load_images

SHOWN = 10  # images of the strip
PARTS = (0.001, 0.01, 0.1, 0.3, 1.0)  # of the bits, after which they are shown


@dataclass(frozen=True)
class Chosen:
    """Images of a data set: their numbers there, uint8 [N, C, H, W], and their classes."""

    numbers: Tensor
    images: Tensor
    labels: Tensor | None


def bound_to(options: LikelihoodOptions) -> None:
    """Take the bound that ``options`` ask for, write it, and say what it is."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = load_model(options.model)
    if checkpoint.normalization is not None:
        raise ValueError(
            f"model {options.model!r} works on normalised images, whose levels are not those of "
            "pixels in [-1, 1]; accepted: a model without a normalization"
        )
    device = choose_device(options.device)
    draws = options.out is not None and options.out.suffix.lower() != ".json"
    if draws:
        check_channels(checkpoint.sample_shape[0])
    chosen = choose(load_images(options.data, options.background), options, checkpoint)  # type: ignore[arg-type]
    variance = options.variance
    if variance == "auto":
        variance = "learned_range" if checkpoint.learned_variance else "fixed_large"
    elif variance.startswith("learned") and not checkpoint.learned_variance:
        raise ValueError(
            f"--variance {variance} needs a network whose output has a variance, and model "
            f"{options.model!r} has none; accepted: auto, fixed_large, fixed_small"
        )
    timesteps = None
    if options.steps is not None:
        total = checkpoint.schedule.num_train_timesteps
        timesteps = spaced_timesteps(
            total,
            number_or_words(options.steps),
            options.spacing,  # type: ignore[arg-type]
        )
    start = time.perf_counter()
    bounding = Bounding(
        checkpoint.model.to(device),
        checkpoint.schedule,
        chosen.images,
        condition=None if chosen.labels is None else {"labels": chosen.labels},
        timesteps=timesteps,
        prediction_type=checkpoint.prediction_type,  # type: ignore[arg-type]
        variance_type=variance,  # type: ignore[arg-type]
        cdf=options.cdf,  # type: ignore[arg-type]
        seed=options.seed,
        first_index=chosen.numbers,
        batch_size=options.batch_size,
        backend=options.backend,
        optimize=compiled_for(options.optimize),
    )
    bound = bounding.bound(progress=Console(stderr=True).is_terminal)
    seconds = time.perf_counter() - start
    if not bool(torch.isfinite(bound.total).all()):
        raise Problem(f"the predictions of model {options.model!r} are not finite")
    settings = {
        "stepfuse": __version__,
        "model": options.model,
        "data": str(options.data),
        "n": len(chosen.numbers),
        "steps": len(bound.timesteps),
        "variance": variance,
        "cdf": options.cdf,
        "labels": options.labels if checkpoint.num_classes else None,
        "seed": options.seed,
    }
    if options.out is not None:
        strip = shown(bounding, bound) if draws else None
        write(options.out, Measured(settings, bound, PARTS, strip))
        wrote(options.out)
    report(bound, options, variance, seconds)


def choose(data: ImageData, options: LikelihoodOptions, checkpoint: Checkpoint) -> Chosen:
    """Images evenly spaced over the data, so that every class of sorted folders is among them.

    Raises ValueError for images of another size or more than 8 bits, and for missing labels.
    """
    where = options.data
    if data.images.dtype != torch.uint8:
        raise ValueError(
            f"images in {where} have 16 bits; accepted: 8, of which the decoder gives probabilities"
        )
    if data.sample_shape != checkpoint.sample_shape:
        raise ValueError(
            f"images in {where} are {_sizes(data.sample_shape)}; accepted by model "
            f"{options.model!r}: {_sizes(checkpoint.sample_shape)}"
        )
    count = min(options.count, len(data))
    numbers = torch.arange(count) * len(data) // count
    labels = None
    if checkpoint.num_classes is not None and options.labels == "data":
        if data.labels is None:
            raise ValueError(
                f"{where} has no labels, which model {options.model!r} is conditioned on; "
                "accepted: a folder per class, an .npz file with 'labels', or --labels none"
            )
        known = Classes(checkpoint.labels)
        classes = [known.number(name, f"a class of {where}") for name in data.class_names]
        labels = torch.tensor(classes)[data.labels[numbers]]
    return Chosen(numbers, data.images[numbers], labels)


def _sizes(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def shown(bounding: Bounding, bound: Bound) -> Tensor:
    """What is known of the first images after `PARTS` of the bits: [len(PARTS), n, C, H, W]."""
    return bounding.predictions([bound.step_after(part) for part in PARTS])[:, :SHOWN].cpu()


def report(bound: Bound, options: LikelihoodOptions, variance: str, seconds: float) -> None:
    """Say on stdout what was found, where it was written, and how fast."""
    console = Console(highlight=False)

    def line(head: str, rest: str) -> None:
        text = Text(head, style="bold").append(rest, style="not bold")
        console.print(text, soft_wrap=True)

    total, count, steps = bound.total, len(bound.total), len(bound.timesteps)
    spread = f" +- {bound.standard_error():.2g}" if count > 1 else ""
    images = "1 image" if count == 1 else f"{count} images"
    line(
        f"{float(total.mean()):.4f} bits/dim", f"{spread}, {images}, {steps} timesteps, {variance}"
    )
    between, last = bound.terms[:, :-1].sum(1).mean(), bound.terms[:, -1].mean()
    line(
        "of these",
        f" L_T {float(bound.prior.mean()):.3g}, between {float(between):.4f}, "
        f"decoder {float(last):.4f}",
    )
    rmse = bound.rate_distortion().rmse
    for part in PARTS[:-1]:
        i = bound.step_after(part)
        at = f"timestep {bound.timesteps[i]}" if i < steps else "the decoder"
        line(f"{100 * part:4g} % of the bits", f": RMSE {float(rmse[i]):.2f} of 255, at {at}")
    if (remark := too_much(bound, variance)) is not None:  # type: ignore[arg-type]
        line("note", f": {remark}")
    evaluations = count * steps / seconds
    what = "printed" if options.out is None else str(options.out)
    line(what, f": {count * steps} evaluations in {seconds:.1f} s: {evaluations:.3g} a second")
