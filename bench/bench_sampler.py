"""The sampler against diffusers' pipeline: `python -m stepfuse.bench.bench_sampler`.

Every comparison is checked before it is timed: the images of both sides agree. Candidates take
turns in one run and medians are quoted, so that a busy machine meets them all.
"""

from __future__ import annotations

import contextlib
import functools
import io
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stepfuse as sf
from stepfuse.bench import machine, peers_setup, script
from stepfuse.bench.able import able
from stepfuse.bench.diffusers_twin import diffusers_twin
from stepfuse.bench.samples import ratio
from stepfuse.bench.timing import in_turn
from stepfuse.bench.verify import LEAST_PSNR, MOST_DIFFERENCE, psnr
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.sampling.program import Program
from stepfuse.engine.sampling.program_cache import Runner

peers_setup.prepare()

HALF = "in bfloat16"
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"graph": None},
    "captured": {},
    "optimized": {"optimize": True},
    HALF: {"optimize": torch.bfloat16},
}
Samples = dict[str, list[float]]


class Network:
    """A U-Net of ours, diffusers' twin of it, and the samplers over both."""

    def __init__(self, name: str) -> None:
        from diffusers import DDIMPipeline, DDIMScheduler

        self.name = name
        torch.manual_seed(0)
        self.labels: int | None = None
        if name == "digits":
            checkpoint = sf.load("digits")
            self.model, self.schedule = checkpoint.model, checkpoint.schedule
            self.channels, self.labels = 1, 3
        else:
            self.model, self.schedule = UNet(UNetConfig.ddpm_cifar10()).eval(), sf.Schedule.linear()
            for weight in self.model.parameters():
                if not weight.any():  # the paper's zeros would make the output trivial
                    torch.nn.init.normal_(weight, std=0.02)
            self.channels = 3
        self.model.requires_grad_(False)
        self.twin = diffusers_twin(self.model, sample_size=32)
        self.pipeline = DDIMPipeline(self.twin, DDIMScheduler(clip_sample=True, steps_offset=0))
        self.pipeline.set_progress_bar_config(disable=True)
        self.settings = {"rederive_epsilon": False}  # as diffusers clips

    def shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.channels, 32, 32)

    def condition(self, batch: int) -> dict[str, Tensor]:
        return {} if self.labels is None else {"labels": torch.full((batch,), self.labels)}

    def sampler(self, steps: int, **more: Any) -> sf.Sampler:
        return sf.Sampler(self.model, self.schedule, steps=steps, **(self.settings | more))

    def idle_sampler(self, batch: int) -> sf.Sampler:
        """The same loop over a network that does nothing."""
        output = torch.zeros(self.shape(batch))
        return sf.Sampler(
            lambda x, t, labels=None: output, self.schedule, steps=50, **self.settings
        )

    def theirs(self, batch: int, steps: int) -> Tensor:
        """DDIMPipeline where the network needs no labels, else the lines of its loop."""
        generator = torch.Generator().manual_seed(0)
        if self.labels is None:
            images = self.pipeline(
                batch, generator, num_inference_steps=steps, output_type="pt", return_dict=False
            )[0]
            return torch.as_tensor(images)
        scheduler, labels = self.pipeline.scheduler, self.condition(batch)["labels"]
        image = torch.randn(self.shape(batch), generator=generator)
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            for t in scheduler.timesteps:
                output = self.twin(image, t, labels).sample
                image = scheduler.step(output, t, image, eta=0.0, generator=generator).prev_sample
        return image

    def ours(self, sampler: sf.Sampler, batch: int) -> Tensor:
        x_T = torch.randn(self.shape(batch), generator=torch.Generator().manual_seed(0))
        return sampler.sample(self.shape(batch), condition=self.condition(batch), x_T=x_T)

    def verify(self, batch: int, steps: int, sampler: sf.Sampler | None = None) -> float:
        """Largest difference of the images, in [-1, 1]; AssertionError above `MOST_DIFFERENCE`."""
        theirs = self.theirs(batch, steps)
        if self.labels is None:  # the pipeline gives [0, 1]
            theirs = theirs * 2 - 1
            if theirs.shape[-1] == self.channels:
                theirs = theirs.permute(0, 3, 1, 2)
        difference = float(
            (self.ours(sampler or self.sampler(steps), batch).clamp(-1, 1) - theirs.clamp(-1, 1))
            .abs()
            .max()
        )
        assert difference <= MOST_DIFFERENCE, f"images differ by {difference:.2g}: nothing is timed"
        return difference


def against_diffusers(network: Network, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Our loop, captured and eager, against diffusers' on the same weights."""
    network.theirs(batch, steps)
    quality: dict[str, float] = {}

    def verified(name: str) -> Callable[[], Any]:
        """A loop of ours whose images are right, by the name of the way it is run."""
        sampler = network.sampler(steps, **WAYS[name])
        if name == HALF:
            exact = network.ours(network.sampler(steps), batch)
            found = psnr(network.ours(sampler, batch), exact)
            assert found > LEAST_PSNR, f"bfloat16 images at {found:.1f} dB: nothing is timed"
            quality["psnr of bfloat16"] = found
        else:
            difference = network.verify(batch, steps, sampler)
            quality["difference"] = max(difference, quality.get("difference", 0.0))
        return lambda: network.ours(sampler, batch)

    ours = able({name: functools.partial(verified, name) for name in WAYS})
    samples = in_turn({"diffusers": lambda: network.theirs(batch, steps), **ours}, rounds)
    return {
        "network": network.name,
        "batch": batch,
        "steps": steps,
        **quality,
        "ms": {name: statistics.median(s) * 1e3 for name, s in samples.items()},
        "times faster": {
            n: ratio(samples["diffusers"], s) for n, s in samples.items() if n != "diffusers"
        },
        "samples": samples,
    }


def outside_the_network(
    network: Network, batch: int, rounds: int, optimize: bool
) -> dict[str, Any]:
    """The share of a captured step that is not the network.

    The rest is timed by itself, with a network that does nothing: as the difference of two large
    times it would drown in their noise.
    """
    runners = {
        "step": _ready(network.sampler(50, optimize=optimize), network, batch),
        "outside": _ready(network.idle_sampler(batch), network, batch),
    }

    def step(runner: Runner[Program]) -> None:
        for _ in range(10):
            runner.program.step.zero_()
            runner.run_step(False)

    with torch.no_grad():
        samples = in_turn({n: (lambda r=r: step(r)) for n, r in runners.items()}, rounds)
    return {
        "network": network.name,
        "batch": batch,
        "optimize": optimize,
        "share": statistics.median(samples["outside"]) / statistics.median(samples["step"]),
        "samples": samples,
    }


def _ready(sampler: sf.Sampler, network: Network, batch: int) -> Runner[Program]:
    """A runner with its captured step, at the start of a loop."""
    network.ours(sampler, batch)
    request = sampler._request(network.shape(batch), condition=network.condition(batch))
    (part,) = request.parts(None)
    return sampler._load(part, sampler.plan)


def linearity(network: Network, rounds: int) -> dict[str, Any]:
    """R^2 of a straight line through time over steps, and over batch."""
    steps = [10, 20, 40, 60, 80, 100]
    samplers = {n: network.sampler(n) for n in steps}
    batches = [1, 2, 4, 6, 8]
    by_batch = network.sampler(10, max_programs=len(batches))
    over_steps = in_turn(
        {str(n): (lambda n=n: network.ours(samplers[n], 1)) for n in steps}, rounds
    )
    over_batch = in_turn({str(n): (lambda n=n: network.ours(by_batch, n)) for n in batches}, rounds)
    return {
        "network": network.name,
        "steps": _r_squared(over_steps),
        "batch": _r_squared(over_batch),
        "samples": {"steps": over_steps, "batch": over_batch},
    }


def watching(network: Network, rounds: int) -> dict[str, Any]:
    """What a progress bar and a callback add to a captured loop of 50 steps.

    Timed with a network that does nothing, and divided by the time of the real loop.
    """
    shape, condition = network.shape(1), network.condition(1)
    real, idle = network.sampler(50), network.idle_sampler(1)
    seen: list[int] = []

    def with_bar() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # drawn, but not on this terminal
            idle.sample(shape, condition=condition, progress=True)

    samples = in_turn(
        {
            "real": lambda: real.sample(shape, condition=condition),
            "plain": lambda: idle.sample(shape, condition=condition),
            "progress": with_bar,
            "callback": lambda: idle.sample(
                shape, condition=condition, callback=lambda step: seen.append(step.index)
            ),
        },
        rounds,
    )
    median = {name: statistics.median(times) for name, times in samples.items()}
    return {
        "network": network.name,
        "progress": (median["progress"] - median["plain"]) / median["real"],
        "callback": (median["callback"] - median["plain"]) / median["real"],
        "samples": samples,
    }


def _r_squared(samples: Samples) -> float:
    x = torch.tensor([float(name) for name in samples], dtype=torch.float64)
    y = torch.tensor([min(s) for s in samples.values()], dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2)


def report(results: dict[str, Any], console: Console) -> None:
    """The tables."""
    table = Table(title="the whole loop against diffusers, medians of one alternating run")
    table.add_column("network")
    for column in ("batch", "steps", "diffusers", *WAYS, "max difference"):
        table.add_column(column, justify="right")
    for row in results["loops"]:
        table.add_row(
            row["network"],
            str(row["batch"]),
            str(row["steps"]),
            f"{row['ms']['diffusers']:.0f} ms",
            *(f"{row['times faster'][n]:.2f}x" if n in row["ms"] else "" for n in WAYS),
            f"{row['difference']:.1e}" if "difference" in row else "",
        )
    console.print(table)
    table = Table(title="inside a captured loop")
    for column in ("network", "figure", "value"):
        table.add_column(column)
    for row in results["outside"]:
        where = f"time outside the network, batch {row['batch']}, optimize={row['optimize']}"
        table.add_row(row["network"], where, f"{row['share']:.2%}")
    line, watched = results["linearity"], results["watching"]
    table.add_row(line["network"], "R^2 of time over steps", f"{line['steps']:.5f}")
    table.add_row(line["network"], "R^2 of time over batch", f"{line['batch']:.5f}")
    table.add_row(watched["network"], "progress bar adds", f"{watched['progress']:+.2%}")
    table.add_row(watched["network"], "callback adds", f"{watched['callback']:+.2%}")
    console.print(table)


def main() -> None:
    """Measure, print, and write the samples where asked to."""
    parser = script.parser(__doc__, rounds=7)
    parser.add_argument("--networks", default="digits,ddpm_cifar10", help="which of the two")
    options = script.parsed(parser)
    networks = [Network(name) for name in options.networks.split(",")]
    results: dict[str, Any] = {"machine": machine.brief(), "loops": [], "outside": []}
    for network in networks:
        steps = 50 if network.name == "digits" else 5
        for batch in (1, 8):
            results["loops"].append(against_diffusers(network, batch, steps, options.rounds))
            results["outside"] += [
                outside_the_network(network, batch, 10 * options.rounds, optimize)
                for optimize in (False, True)
            ]
    results["linearity"] = linearity(networks[0], 3 * options.rounds)
    results["watching"] = watching(networks[0], 4 * options.rounds)
    report(results, script.console())
    script.save(options.json, results)


if __name__ == "__main__":
    main()
