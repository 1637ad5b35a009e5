"""The images of the GPU are those of the CPU, whatever batch they are drawn in."""

from __future__ import annotations

import os

import torch

from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.digits import Digits, comparable, largest
from stepfuse.bench.gpu_check.parts import each
from stepfuse.bench.verify import psnr

LEAST_DB = 90.0  # of float32 images with TF32 off
LEAST_BF16_DB = 30.0  # bfloat16 convolutions are at about 40 dB on the CPU
THREADS = 16  # of the CPU that draws the reference


def run(context: Context) -> None:
    """Draw on both, compare; then in other batches, in bfloat16 and with TF32."""
    comparable()
    if not context.stands_in:
        torch.set_num_threads(min(THREADS, len(os.sched_getaffinity(0))))
    count, steps = context.sized(64, 3), context.sized(50, 3)
    there, here = Digits(context.device), Digits(torch.device("cpu"))
    drawn: dict[str, torch.Tensor] = {}

    def cpu() -> None:
        sampler = here.sampler(steps=steps, graph=None)
        drawn["cpu"] = here.draw(sampler, count)

    def device() -> None:
        images = there.draw(there.sampler(steps=steps), count)
        drawn["device"] = images
        decibels = psnr(images.cpu(), drawn["cpu"])
        context.note("float32, to the CPU, dB", decibels)
        context.note("float32, largest difference", largest(images, drawn["cpu"]))
        context.expect(
            decibels >= LEAST_DB,
            f"{count} digits are at {decibels:.1f} dB of the CPU's, at least {LEAST_DB:g} expected",
        )

    def batches() -> None:
        rows = []
        for size in context.sized((1, 7, 32), (1, 2)):
            few = min(count, 8 * size)
            images = there.draw(there.sampler(steps=steps), few, batch_size=size)
            whole = drawn["device"][:few]
            decibels = psnr(images.cpu(), whole.cpu())
            difference = largest(images, whole)
            rows.append({"batch": size, "images": few, "difference": difference, "dB": decibels})
            context.note("in other batches", rows)
            context.expect(
                decibels >= LEAST_DB,
                f"in batches of {size}: {decibels:.1f} dB, at least {LEAST_DB:g} expected",
            )

    def bfloat16() -> None:
        images = there.draw(there.sampler(steps=steps, optimize=torch.bfloat16), count)
        decibels = psnr(images.cpu(), drawn["cpu"])
        context.note("bfloat16, optimised, dB", decibels)
        context.expect(
            decibels >= LEAST_BF16_DB,
            f"in bfloat16: {decibels:.1f} dB, at least {LEAST_BF16_DB:g} expected",
        )

    def tf32() -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        images = there.draw(there.sampler(steps=steps), count)
        context.note("TF32, dB", psnr(images.cpu(), drawn["cpu"]))

    each(
        context,
        {"cpu": cpu, "device": device, "batches": batches, "bfloat16": bfloat16, "tf32": tf32},
    )


CHECK = Check(
    "pictures",
    "correctness",
    25.0,
    run,
    "64 digits against the CPU with TF32 off, and against themselves in other batches; bfloat16 "
    "and TF32 are noted.",
)
