"""The bound on the likelihood against guided-diffusion's loop.

    python -m stepfuse.bench.bench_likelihood [--images N] [--json FILE] [--rounds N] [--threads N]

Both take the bound of the same noised images over one chain of the digits' network. The bits of
every image are compared first; then the candidates take turns in one run. The loop has one timestep
and all images in an evaluation, as its authors wrote it; ours fills batches with pairs. What the
first call costs, with the compiler in it, is measured once, before everything else: for a process
that has compiled nothing yet, ask for one case with --images.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stepfuse as sf
from stepfuse.bench import machine, script, timing
from stepfuse.bench.guided_bound import calc_bpd_loop
from stepfuse.bench.samples import ratio
from stepfuse.bench.timing import Turns
from stepfuse.kernels import philox

LOOP, EAGER, COMPILED = "guided-diffusion's loop", "eager", "optimized"
WAYS: dict[str, dict[str, Any]] = {EAGER: {}, COMPILED: {"optimize": True}}
CASES = ((4, 100), (16, 250))  # images, timesteps
NEAR = 1e-3  # bits/dim: sums of a network in another order


class Work:
    """So many images of the model's own, 8 bits, and the noise of a chain of so many timesteps."""

    def __init__(self, images: int, steps: int) -> None:
        self.checkpoint = sf.load("digits")
        self.labels = torch.arange(images) % 10
        self.timesteps = sf.spaced_timesteps(1000, steps)
        drawn = sf.Sampler(self.checkpoint.model, self.checkpoint.schedule, steps=10).sample(
            (images, *self.checkpoint.sample_shape), condition={"labels": self.labels}
        )
        self.x0 = ((drawn.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        numbers, shape = torch.arange(images), tuple(self.x0.shape[1:])
        self.noise = torch.stack([philox.normal(0, numbers, t, shape) for t in self.timesteps])

    def ours(self, way: str) -> Tensor:
        """Bits/dim of every image."""
        bound = sf.bits_per_dim(
            self.checkpoint.model,
            self.checkpoint.schedule,
            self.x0,
            condition={"labels": self.labels},
            timesteps=self.timesteps,
            cdf="tanh",
            **WAYS[way],
        )
        return bound.total

    @torch.no_grad()
    def theirs(self) -> Tensor:
        """The same."""
        terms = calc_bpd_loop(
            lambda x, t: self.checkpoint.model(x, t, self.labels),
            self.checkpoint.schedule.alphas_cumprod,
            self.timesteps,
            self.x0,
            list(self.noise),
            "fixed_large",
        )
        return terms.prior.double() + terms.bits.double().sum(1)


def measure(images: int, steps: int, rounds: int) -> dict[str, Any]:
    """Compare, then time in turn."""
    work = Work(images, steps)
    start = time.perf_counter()
    found = {COMPILED: work.ours(COMPILED)}
    first = time.perf_counter() - start
    found[EAGER], exact = work.ours(EAGER), work.theirs()
    for way, bits in found.items():
        largest = float((bits - exact).abs().max())
        assert largest <= NEAR, f"{way}: bits/dim differ by {largest:.2g}"
    calls = {LOOP: work.theirs, **{way: (lambda w=way: work.ours(w)) for way in WAYS}}
    # all of them have run to be compared
    turns = Turns({name: timing.Work(call) for name, call in calls.items()})
    samples = turns.run(rounds).seconds
    return {
        "images": images,
        "steps": steps,
        "difference": {way: float((bits - exact).abs().max()) for way, bits in found.items()},
        "first_seconds": first,
        "times faster": {way: ratio(samples[LOOP], samples[way]) for way in WAYS},
        "first times faster": statistics.median(samples[LOOP]) / first,
        "samples": samples,
    }


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """The table."""
    table = Table(title="bits/dim of the digits' network", caption=machine.caption())
    for heading in ("images", "timesteps", LOOP, *WAYS, "optimized, first call", "difference"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["images"]),
            str(row["steps"]),
            f"{statistics.median(row['samples'][LOOP]):.2f} s",
            *(f"{row['times faster'][way]:.2f}x" for way in WAYS),
            f"{row['first times faster']:.2f}x",
            f"{max(row['difference'].values()):.1e}",
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the samples where asked to."""
    parser = script.parser(__doc__, rounds=3)
    parser.add_argument("--images", type=int, help="only the case of so many images")
    options = script.parsed(parser, arguments)
    chosen = [case for case in CASES if options.images in (None, case[0])]
    if not chosen:
        known = ", ".join(str(images) for images, _ in CASES)
        parser.error(f"--images must be one of {known}; got {options.images}")
    rows = [measure(images, steps, options.rounds) for images, steps in chosen]
    report(rows, script.console())
    document = {"machine": machine.brief(), "rounds": options.rounds, "cases": rows}
    script.save(options.json, document)


if __name__ == "__main__":
    main()
