"""A captured step is the eager one, whatever is done around it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import stepfuse as sf
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.digits import Digits, comparable, guidance, largest
from stepfuse.bench.gpu_check.parts import each
from stepfuse.bench.gpu_check.refused import after_a_refusal, functions
from stepfuse.bench.gpu_check.streams import two_threads
from stepfuse.bench.verify import psnr

SETTINGS: tuple[dict[str, Any], ...] = (
    {"eta": 0.0},
    {"eta": 0.5},
    {"eta": 0.0, "guidance": guidance()},
    {"eta": 0.5, "guidance": guidance()},
    {"method": "ddpm"},
)
TURNS = (1, 2, 1, 3, 1, 4, 1, 5, 1)  # batches, with room for two programs
LEAST_DB = 60.0  # of images of an optimised float32 network, to those of the network itself


def run(context: Context) -> None:
    """The refused captures last: they may leave the process unable to capture anything."""
    comparable()
    digits = Digits(context.device)
    parts = {
        "replays": _replays,
        "two tables": _two_tables,
        "eviction of programs": _evicted_programs,
        "eviction of networks": _evicted_networks,
        "a function as model": functions,
        "two threads": two_threads,
        "after a refusal": after_a_refusal,
    }
    each(context, {name: partial(part, context, digits) for name, part in parts.items()})


def _replays(context: Context, digits: Digits) -> None:
    """Both kinds of graph against the eager loop, when captured and when only replayed."""
    count, steps = context.sized(8, 2), context.sized(10, 3)
    rows = []
    for settings in SETTINGS:
        eager = digits.draw(digits.sampler(graph=None, steps=steps, **settings), count)
        context.expect(bool(eager.isfinite().all()), f"{_words(settings)}: eager is not finite")
        for graph in ("step", "loop"):
            sampler = digits.sampler(graph=graph, steps=steps, **settings)
            captured, replayed = (digits.draw(sampler, count) for _ in range(2))
            name = f"{_words(settings)}, graph={graph!r}"
            difference = max(largest(captured, eager), largest(replayed, eager))
            same = torch.equal(captured, eager) and torch.equal(replayed, eager)
            context.expect(same, f"{name}: differs from eager by up to {difference:.3g}")
            _captured(context, name, sampler)
            stats = sampler.stats()
            rows.append({"settings": name, "difference": difference, **_some(stats)})
            context.note("replays", rows)


def _two_tables(context: Context, digits: Digits) -> None:
    """Another number of steps and another eta on the capture that is there."""
    steps, others = context.sized((10, 7), (3, 2))
    sampler = digits.sampler(graph="step", steps=steps)
    digits.draw(sampler, 2)
    for count, eta in ((others, 0.7), (steps, 0.0)):
        sampler.set_timesteps(count, eta=eta)
        found = digits.draw(sampler, 2, seed=3)
        eager = digits.draw(digits.sampler(graph=None, steps=count, eta=eta), 2, seed=3)
        context.expect(
            torch.equal(found, eager),
            f"{count} steps, eta {eta}, on a kept capture: off by {largest(found, eager):.3g}",
        )
    captures = sampler.stats()["captures"]
    context.expect(captures == 1, f"three tables took {captures} captures, not 1")


def _evicted_programs(context: Context, digits: Digits) -> None:
    """What a captured step reads lives on while others are thrown out."""
    turns = context.sized(TURNS, (1, 2, 1, 3, 1))
    steps = context.sized(4, 2)
    sampler = digits.sampler(graph="step", steps=steps, optimize=True, max_programs=2)
    plain = digits.sampler(graph=None, steps=steps)
    first: dict[int, Tensor] = {}
    for turn, count in enumerate(turns):
        images = digits.draw(sampler, count)
        name = f"turn {turn}, batch {count}"
        if count in first:
            difference = largest(images, first[count])
            same = torch.equal(images, first[count])
            context.expect(same, f"{name}: differs from its first images by {difference:.3g}")
        else:
            _near(context, name, images, digits.draw(plain, count))
        first.setdefault(count, images)
        trample(context)
    _captured(context, "eviction of programs", sampler)
    context.note("eviction of programs", sampler.stats())


def _evicted_networks(context: Context, digits: Digits) -> None:
    """One compiled network at a time, and a guidance that needs two."""
    steps = context.sized(4, 2)
    x, t = torch.zeros(digits.shape(2), device=context.device), torch.zeros(2, dtype=torch.int64)
    example = (x, t.to(context.device), digits.condition(2))
    fast = sf.optimize(digits.model, example, max_networks=1)
    sampler = digits.sampler(fast, graph="step", steps=steps, guidance=guidance())
    plain = digits.sampler(graph=None, steps=steps, guidance=guidance())
    first = digits.draw(sampler, 2)
    _near(context, "max_networks=1, guided", first, digits.draw(plain, 2))
    for turn in range(context.sized(2, 1)):
        trample(context)
        again = digits.draw(sampler, 2)
        same, difference = torch.equal(again, first), largest(again, first)
        context.expect(same, f"max_networks=1, guided, turn {turn}: off by {difference:.3g}")
    context.note("eviction of networks", sampler.stats())


def trample(context: Context) -> None:
    """Fill memory that nobody owns with NaN: whoever still reads there gives NaN, too."""
    sizes = [2**power for power in range(7, context.sized(24, 12))]
    held = [
        torch.full((size,), torch.nan, device=context.device) for size in sizes for _ in range(8)
    ]
    context.synchronize()
    del held


def _near(context: Context, name: str, images: Tensor, plain: Tensor) -> None:
    decibels = psnr(images.cpu(), plain.cpu())
    context.expect(
        decibels >= LEAST_DB,
        f"{name}: {decibels:.1f} dB to the network itself, at least {LEAST_DB:g} expected",
    )


def _captured(context: Context, name: str, sampler: sf.Sampler) -> None:
    stats = sampler.stats()
    context.expect(
        stats["eager_steps"] == 0 and stats["replays"] > 0,
        f"{name}: not captured ({sampler.explain().splitlines()[-1]})",
    )


def _some(stats: dict[str, int]) -> dict[str, int]:
    return {name: stats[name] for name in ("captures", "replays", "eager_steps")}


def _words(settings: dict[str, Any]) -> str:
    named = {**settings, "guidance": "CFG"} if "guidance" in settings else settings
    return " ".join(f"{name}={value}" for name, value in named.items())


CHECK = Check(
    "graphs",
    "correctness",
    40.0,
    run,
    "A replayed step is the eager one bit for bit, also when programs and networks are evicted, "
    "from two threads, and after a model whose capture was refused.",
)
