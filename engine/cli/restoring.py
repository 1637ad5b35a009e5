"""``stepfuse restore``: the work."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from stepfuse._version import __version__
from stepfuse.engine.cli.errors import Problem
from stepfuse.engine.cli.models import choose_device, load_model
from stepfuse.engine.cli.printing import wrote
from stepfuse.engine.cli.restore_options import RestoreOptions
from stepfuse.engine.cli.restore_tasks import operator_of, read_image, read_measurement, shown
from stepfuse.engine.files.charts import SHARP, below, beside, text_pixels
from stepfuse.engine.files.images import (
    MAX_SCALE,
    Pixels,
    check_channels,
    encode_png,
    grid,
    save_png,
    to_pixels,
    upscale,
    viewable_scale,
)
from stepfuse.engine.files.writing import write_file
from stepfuse.engine.generate.conditions.classes import Classes
from stepfuse.engine.generate.recipe import number_or_words, steering
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.sampling.guidance.measured import DPS, Measured, PiGDM
from stepfuse.engine.sampling.inverse.operator import Operator
from stepfuse.kernels import philox
from stepfuse.kernels.limits import check_memory

DEMO_IMAGES = 4
DATA_STD = 0.6
NOISE_STEP = 0  # counter of the noise of a measurement, under a seed that no sample has
HEADING = 22  # points above a column


def restore_to(options: RestoreOptions) -> None:
    """Find what ``options`` ask for, write it, and say how good and how fast it was."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = load_model(options.model)
    shape = checkpoint.sample_shape
    if checkpoint.normalization is not None:
        raise ValueError(
            f"model {options.model!r} works on normalised images, and measurements are of pixels "
            "in [-1, 1]; accepted: a model without a normalization"
        )
    check_channels(shape[0])
    a = operator_of(options, shape)
    guidance = guidance_of(options, a)
    pictures = 1 if options.picture is not None else options.images or DEMO_IMAGES
    total = pictures * options.count
    check_memory(f"-n {options.count}", 8 * total * int(np.prod(shape)))
    condition = condition_of(options, checkpoint, total)
    checkpoint.model.to(choose_device(options.device))
    sampler = checkpoint.sampler(
        method="ddim",
        steps=number_or_words(options.steps),
        eta=options.eta,
        guidance=guidance,
        backend=options.backend,
    )
    truth = None
    if options.demo:
        truth = images_of(options, checkpoint, pictures)
        y = a(truth) + options.noise * measured_noise(options.seed, a(truth))
    else:
        assert options.picture is not None
        y = read_measurement(a, options.picture, shape)

    start = time.perf_counter()
    x = sampler.sample(
        (total, *shape),
        seed=options.seed,
        batch_size=min(options.batch_size, total),
        condition=condition,
        measurement=y.repeat_interleave(options.count, 0),
        progress=Console(stderr=True).is_terminal,
    ).cpu()
    seconds = time.perf_counter() - start

    if not bool(torch.isfinite(x).all()):
        raise Problem("the samples are not finite; less --scale or more --noise may help")
    found = x.clamp(-1, 1).view(pictures, options.count, *shape)
    text = {"stepfuse": json.dumps(settings_of(options))}
    if truth is None:
        picture = samples(found[0])
    else:
        picture = strip(truth, shown(a, y, shape), a.pinv(y).clamp(-1, 1), found)
    save_png(options.out, picture, text)
    paths = [options.out]
    if options.std is not None:
        spread = found.std(1, correction=1)  # of values in [-1, 1]: twice that of levels
        write_file(options.std, encode_png(samples(spread.clamp(max=1), low=0), text))
        paths.append(options.std)
    wrote(*paths)
    report(options, found, truth, a.pinv(y).clamp(-1, 1), seconds)


def guidance_of(options: RestoreOptions, a: Operator) -> Measured:
    """PiGDM or DPS, with classifier-free guidance where that is asked for."""
    cfg = steering(options.guidance)
    if options.method == "dps":
        return DPS(a, 1.0 if options.scale is None else options.scale, cfg=cfg)
    std = DATA_STD if options.data_std is None else options.data_std
    return PiGDM(a, options.noise, std, options.weight or "score", cfg=cfg)  # type: ignore[arg-type]


def condition_of(
    options: RestoreOptions, checkpoint: Checkpoint, count: int
) -> dict[str, Tensor] | None:
    """The label of every sample: the null class where none is known."""
    classes = checkpoint.num_classes
    if options.label is None or classes is None:
        if options.guidance != 1:
            raise ValueError(f"--guidance {options.guidance:g} needs a --label to be guided by")
        if options.label is not None:
            raise ValueError(f"--label {options.label}: model {options.model!r} has no classes")
        return None if classes is None else {"labels": torch.full((count,), classes)}
    number = Classes(checkpoint.labels).number(options.label, "--label")
    assert number is not None
    return {"labels": torch.full((count,), number)}


def images_of(options: RestoreOptions, checkpoint: Checkpoint, count: int) -> Tensor:
    """The images of a demo: the picture, or those that the model draws, classes taking turns."""
    if options.picture is not None:
        return read_image(options.picture, checkpoint.sample_shape)
    classes = checkpoint.num_classes
    condition = None if classes is None else {"labels": torch.arange(count) % classes}
    drawn = checkpoint.sampler(steps=number_or_words(options.steps)).sample(
        (count, *checkpoint.sample_shape),
        seed=_apart(options.seed, 1),
        batch_size=min(options.batch_size, count),
        condition=condition,
    )
    return drawn.cpu().clamp(-1, 1)


def measured_noise(seed: int, like: Tensor) -> Tensor:
    """N(0, 1) of the measurements, by (seed, picture)."""
    count = len(like)
    seeds = torch.full((count,), _apart(seed, 2))
    return philox.normal(seeds, torch.arange(count), NOISE_STEP, like.shape[1:])


def _apart(seed: int, purpose: int) -> int:
    """A seed of the demo's own, int64."""
    return (seed ^ (purpose << 61)) & (2**63 - 1)


def samples(x: Tensor, low: float = -1.0) -> Pixels:
    """One image in its own size, or several in a grid."""
    pixels = to_pixels(x, low)
    if len(pixels) == 1:
        one: Pixels = pixels[0]
        return one
    return grid(upscale(pixels, viewable_scale(*pixels.shape[1:3])))


def strip(truth: Tensor, y: Tensor, pinv: Tensor, found: Tensor) -> Pixels:
    """A row for every image: itself, what was measured, the pseudo-inverse, the samples, and of
    several their mean.
    """
    columns = [("image", truth), ("measured", y), ("pseudo-inverse", pinv)]
    columns += [(f"sample {n + 1}", found[:, n]) for n in range(found.shape[1])]
    if found.shape[1] > 1:
        columns.append(("mean", found.mean(1)))
    scale = min(MAX_SCALE, 2 * SHARP * viewable_scale(*truth.shape[2:]))
    drawn = []
    for name, images in columns:
        column = grid(upscale(to_pixels(images), scale), 1, background=255)
        if column.ndim == 2:
            column = np.repeat(column[..., None], 3, axis=2)
        heading = text_pixels(name, column.shape[1] // SHARP, HEADING)
        drawn.append(below([heading, column]))
    return beside(drawn)


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """10 log10(4 / mean square error) of values in [-1, 1], dB, [N]."""
    return 10 * torch.log10(4 / (x - truth).flatten(1).square().mean(1).clamp_min(1e-12))


def settings_of(options: RestoreOptions) -> dict[str, Any]:
    """What decides the picture, by the names of the command line."""
    left_out = {"out", "std", "batch_size", "backend", "device", "threads"}
    kept = {k: v for k, v in vars(options).items() if k not in left_out and v is not None}
    named = {k: str(v) if k in ("picture", "mask") else v for k, v in kept.items()}
    return {"stepfuse": __version__, **named}


def report(
    options: RestoreOptions, found: Tensor, truth: Tensor | None, pinv: Tensor, seconds: float
) -> None:
    """Say on stdout what was found, where it was written, and how fast."""
    console = Console(highlight=False)

    def line(head: str, rest: str) -> None:
        text = Text(head, style="bold").append(rest, style="not bold")
        console.print(text, soft_wrap=True)

    if truth is not None:
        parts = [
            f"pseudo-inverse {float(psnr(pinv, truth).mean()):.2f}",
            f"one sample {float(psnr(found[:, 0], truth).mean()):.2f}",
        ]
        if options.count > 1:
            parts.append(
                f"mean of {options.count} samples {float(psnr(found.mean(1), truth).mean()):.2f}"
            )
        line("PSNR, dB", f": {', '.join(parts)}")
    count = found.shape[0] * found.shape[1]
    what = "1 sample" if count == 1 else f"{count} samples"
    line(
        str(options.out),
        f": {what} by {options.method}, {options.steps} steps, in {seconds:.1f} s: "
        f"{count / seconds:.3g} a second",
    )
    if options.std is not None:
        line(str(options.std), ": the standard deviation of the samples")
