"""The whole loop of 50 steps: captured by step and as one, against eager and against PyTorch."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepfuse.bench.able import described
from stepfuse.bench.gpu_check import sd_unet
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.loop_candidates import OURS, PLAIN, Draw, Subject
from stepfuse.bench.gpu_check.network_candidates import SIDE, TINY_SIDE
from stepfuse.bench.gpu_check.timing import (
    Clock,
    attempt,
    ratio,
    relative_error,
    rounded,
    tf32_flags,
)
from stepfuse.bench.tf32 import tf32
from stepfuse.engine.networks.checkpoint import load
from stepfuse.engine.sampling.schedule import Schedule

STEPS, TINY_STEPS = 50, 3
BATCHES, TINY_BATCHES = (64, 1, 512), (2, 1)
ROUNDS, SECONDS = 9, 3.0
LEAST_S = 12.0  # seconds that must be left for another comparison
# relative error of the images: TF32 keeps 10 bits and bfloat16 7, and errors add up over the steps.
# Ours may be as far off as `SLACK` times the plain loop in the same dtype
TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 0.2, torch.float16: 5e-2}
SLACK = 3.0


def run(context: Context) -> None:
    """digits in float32 with TF32 and in bfloat16, then the U-Net at batch 1."""
    batches = context.sized(BATCHES, TINY_BATCHES)
    with torch.no_grad(), tf32(True):
        context.note("flags", {"tf32": tf32_flags()})
        jobs: list[tuple[str, Callable[[Context], Subject], tuple[int, ...]]] = [
            ("digits fp32", functools.partial(digits, lower=None), batches[:1]),
            ("unet", unet, (1,)),
            ("digits fp32", functools.partial(digits, lower=None), batches[1:]),
            ("digits bf16", functools.partial(digits, lower=torch.bfloat16), batches),
        ]
        for name, make, sizes in jobs:
            subject = attempt(context, name, functools.partial(make, context))
            if subject is None:
                context.expect(False, f"{name}: {context.facts[name]}")
                continue
            for batch in sizes:
                _compared(context, f"{name} batch {batch}", subject, batch)


def digits(context: Context, lower: torch.dtype | None) -> Subject:
    """The embedded checkpoint, its classes taking turns."""
    checkpoint = load("digits")
    classes = checkpoint.num_classes or 1

    def condition(batch: int) -> dict[str, Tensor]:
        return {"labels": torch.arange(batch, device=context.device) % classes}

    return Subject(
        checkpoint.model.to(context.device),
        checkpoint.schedule,
        checkpoint.prediction_type,
        checkpoint.sample_shape,
        context.sized(STEPS, TINY_STEPS),
        context.device,
        condition,
        lower,
    )


def unet(context: Context) -> Subject:
    """The U-Net of Stable Diffusion 1.5's shape, float16 on a GPU."""
    shape = context.sized(sd_unet.Shape(), sd_unet.TINY)
    dtype, side = context.sized((torch.float16, SIDE), (torch.float32, TINY_SIDE))
    model = sd_unet.build(shape, context.device, dtype)

    def condition(batch: int) -> dict[str, Tensor]:
        text = sd_unet.inputs(shape, batch, side, context.device, dtype)[2]
        return {"encoder_hidden_states": text}

    steps = context.sized(STEPS, TINY_STEPS)
    sizes = (shape.latents, side, side)
    schedule = Schedule.scaled_linear()
    return Subject(model, schedule, "epsilon", sizes, steps, context.device, condition)


def _compared(context: Context, title: str, subject: Subject, batch: int) -> None:
    """Every loop verified, then timed in turn."""
    if context.seconds_left < LEAST_S:
        context.note(title, "left out: no time was left")
        return
    facts: dict[str, dict[str, Any]] = {}
    with tf32(False):
        exact = attempt(context, title, functools.partial(subject.exact, batch))
    if exact is None:
        context.expect(False, f"{title}: {context.facts[title]}")
        return
    able: dict[str, Draw] = {}
    images: dict[str, Tensor] = {}
    dtype = subject.lower or next(subject.model.parameters()).dtype
    allowed = TOLERANCE[dtype]
    # what is not compiled computes in the dtype of its weights, which is another comparison
    ours = [name for name, (_, compiled) in OURS.items() if compiled or subject.lower is None]
    for name in (PLAIN, *ours):
        try:
            draw = subject.candidate(name, batch)
            images[name] = draw().clone()
        except Exception as error:  # of one candidate: the others go on
            facts[name] = {"failed": described(error)}
            context.expect(name == PLAIN, f"{title}: {name}: {described(error)}")
            continue
        error = relative_error(images[name], exact)
        facts[name] = {"error": rounded(error) if error == error else None}
        if name == PLAIN and error == error:
            allowed = max(allowed, SLACK * error)
        elif name != PLAIN:
            context.expect(error <= allowed, f"{title}: {name} is off by {error:.3g}")
        if error <= allowed:
            able[name] = draw
    _note_equality(images, facts)
    context.note(title, facts)
    times = Clock(context).alternate(able, context.sized(ROUNDS, 2), SECONDS)
    for name, found in times.items():
        facts[name] |= found.milliseconds()
        if found.failed:
            facts[name]["failed"] = found.failed
            continue
        wall, host = statistics.median(found.wall), statistics.median(found.host)
        replays = 1 if name == "optimized loop" else subject.steps
        facts[name]["images_per_s"] = rounded(batch / wall)
        facts[name]["host_us_per_step" if replays > 1 else "host_us"] = rounded(
            1e6 * host / replays
        )
        if PLAIN in times and name != PLAIN:
            facts[name][f"{PLAIN} / this, wall"] = ratio(times[PLAIN], found, "wall")
    context.note(title, facts)


def _note_equality(images: dict[str, Tensor], facts: dict[str, dict[str, Any]]) -> None:
    """Whether replays give bit by bit what the same calls give one by one."""
    eager = images.get("optimized eager")
    for name in ("optimized step", "optimized loop"):
        if eager is not None and name in images:
            facts[name]["equals_eager"] = torch.equal(images[name], eager)


CHECK = Check(
    "loop",
    "speed",
    90.0,
    run,
    "The whole loop of 50 steps, captured by step and as one graph, against eager: images per "
    "second, and the host's time of a step.",
)
