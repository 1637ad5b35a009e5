"""Shapes that come and go leave nothing behind."""

from __future__ import annotations

import gc
from functools import partial

import torch

import stepfuse as sf
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.digits import Digits, comparable
from stepfuse.bench.gpu_check.parts import each
from stepfuse.kernels import torch_names

SHAPES = 30  # batches 1 .. SHAPES
OPTIMISED = 3  # batches of the optimised network: each is compiled
EVERY = 5  # shapes after which memory is read
KEPT = 3  # programs
SLACK = 1 << 20  # bytes of tensors that may stay, for Python objects that are collected later
# bytes of the device's memory: a graph's pool is taken in blocks of 20 MB
RESERVED_SLACK = 64 << 20


def run(context: Context) -> None:
    """All shapes, and all again: the second time must not need more."""
    comparable()
    digits = Digits(context.device)
    shapes = context.sized(SHAPES, 4)
    parts = {
        "as it is": partial(_turns, context, digits, "as it is", shapes, False),
        "optimised": partial(
            _turns, context, digits, "optimised", context.sized(OPTIMISED, 2), True
        ),
    }
    each(context, parts)


def _turns(context: Context, digits: Digits, name: str, shapes: int, optimize: bool) -> None:
    kept = 1 if optimize else KEPT
    sampler = digits.sampler(graph="step", steps=2, max_programs=kept, optimize=optimize)
    held = []
    for turn in (1, 2):
        for count in range(1, shapes + 1):
            digits.draw(sampler, count)
            if count % EVERY == 0 or count == shapes:
                row = {"turn": turn, "batch": count, **_held(context, sampler.stats()["bytes"])}
                held.append(row)
                context.note(f"bytes, {name}", held)
    stats = sampler.stats()
    context.note(f"counts, {name}", stats)
    before, after = (row for row in held if row["batch"] == shapes)
    for field, slack in (("allocated", SLACK), ("reserved", RESERVED_SLACK)):
        context.expect(
            after[field] <= before[field] + slack,
            f"{name}: {field} memory grew from {before[field]} to {after[field]} bytes while the "
            "same shapes came again",
        )
    _causes(context, name, sampler)
    context.expect(stats["programs"] <= kept, f"{name}: {stats['programs']} programs are kept")
    context.expect(
        stats["eager_steps"] == 0, f"{name}: not captured ({sampler.explain().splitlines()[-1]})"
    )


def _causes(context: Context, name: str, sampler: sf.Sampler) -> None:
    """What is left when first the library's workspaces and then what nobody uses is given up."""
    if context.stands_in:
        return
    left = {}
    torch_names.clear_cublas_workspaces()
    left["without the workspaces of cuBLAS"] = _held(context, sampler.stats()["bytes"])
    torch.cuda.empty_cache()
    left["after empty_cache()"] = _held(context, sampler.stats()["bytes"])
    sampler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    left["after reset() and empty_cache()"] = _held(context, sampler.stats()["bytes"])
    context.note(f"bytes left, {name}", left)


def _held(context: Context, static: int) -> dict[str, int]:
    gc.collect()
    if context.stands_in:
        return {"static buffers": static, "allocated": static, "reserved": static}
    context.synchronize()
    return {
        "static buffers": static,
        "allocated": torch.cuda.memory_allocated(context.device),
        "reserved": torch.cuda.memory_reserved(context.device),
    }


CHECK = Check(
    "memory",
    "correctness",
    25.0,
    run,
    "30 shapes in turn with room for 3, twice: allocated and reserved memory are no more after the "
    "second time than after the first.",
)
