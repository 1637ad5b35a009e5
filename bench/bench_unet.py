"""One evaluation of a U-Net against every runtime: `python -m stepfuse.bench.bench_unet`.

A candidate is checked against the eager float32 network before it is timed, and left out where it
is wrong. All take turns in one run; medians and ratios of one round each are reported. "products"
is the sum of the network's own convolutions and linear layers, each timed alone in the same rounds
with packed weights: what remains when everything between them costs nothing. "cpu ms" is the least
processor time of an evaluation, all threads together: on a busy machine it tells more than the
clock, though a thread that waits by spinning counts too.

    OMP_NUM_THREADS=2 python -m stepfuse.bench.bench_unet --batch 1 8 32 --memory --json unet.json

``--memory`` runs every candidate once more, alone in a process of its own, and prints a table of
their resident sets.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.bench import machine, peers_setup, script, unet_memory
from stepfuse.bench.able import able, to_stderr
from stepfuse.bench.peers import PEERS, Call
from stepfuse.bench.products import products
from stepfuse.bench.samples import ratio
from stepfuse.bench.timing import Turns, Work
from stepfuse.bench.unet_candidates import OURS, PRECISIONS, TOLERANCE, inputs, maker, network
from stepfuse.bench.verify import psnr
from stepfuse.engine.files.reading import read_text

MODELS = ("cifar10", "digits")
MOST_IMAGES = 8  # of a batch whose images are compared: fifty evaluations of every candidate


@dataclass
class Candidate:
    """One way to evaluate the network, with what was measured of it."""

    name: str
    dtype: str
    call: Call
    first_step: float
    memory: int
    error: float = math.nan
    psnr: float = math.nan
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def build(name: str, dtype: str, make: Callable[[], Call], x: Tensor, t: Tensor) -> Candidate:
    """Time from nothing to the first result, and the memory that it holds then."""
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    call = make()
    call(x, t)
    seconds = time.perf_counter() - start
    return Candidate(name, dtype, call, seconds, process.memory_info().rss - before)


def candidates(model: nn.Module, x: Tensor, t: Tensor, names: list[str]) -> list[Candidate]:
    """Ours, then the peers that were asked for; those that cannot run are named with the reason."""
    # one that has freed its weights computes what one that has parked them does
    dtypes = {name: dtype for name, (dtype, weights) in OURS.items() if weights != "released"}
    dtypes |= {peer.name: peer.dtype for peer in PEERS if peer.name in names}

    def made(name: str) -> Candidate:
        make = _of_a_copy(name, model, x, t) if name in OURS else maker(name, model, x, t)
        return build(name, dtypes[name], make, x, t)

    return list(able({name: functools.partial(made, name) for name in dtypes}).values())


def _of_a_copy(name: str, model: nn.Module, x: Tensor, t: Tensor) -> Callable[[], Call]:
    """`maker` of one that moves the weights: those of the other candidates stay where they are."""
    return lambda: maker(name, copy.deepcopy(model), x, t)()


def verified(found: list[Candidate], model: nn.Module, x: Tensor, t: Tensor) -> list[Candidate]:
    """Those whose result agrees with the eager network."""
    exact = model(x, t).double()
    for c in found:
        c.error = float((c.call(x, t).double() - exact).norm() / exact.norm())
    wrong = [c for c in found if not c.error <= TOLERANCE[c.dtype]]
    for c in wrong:
        to_stderr(f"{c.name} left out: relative error {c.error:.2g}")
    return [c for c in found if c not in wrong]


def sums_of_products(model: nn.Module, x: Tensor, t: Tensor) -> dict[str, Callable[[], None]]:
    """`products` in every precision that this CPU has; the others are named with the reason."""
    makers = {
        f"products {dtype}": functools.partial(products, model, x, t, precision)
        for dtype, precision in PRECISIONS.items()
    }
    return {name.rpartition(" ")[2]: run for name, run in able(makers).items()}


def compare_images(found: list[Candidate], model: nn.Module, x: Tensor) -> None:
    """PSNR of 50-step DDIM images to those of eager float32."""

    def images(call: Call) -> Tensor:
        schedule = sf.Schedule.linear()
        sampler = sf.Sampler(
            lambda x, t: call(x, t), schedule, steps=50, graph=None, device=x.device
        )
        return sampler.sample(x.shape, seed=0)

    exact = images(model)
    for c in found:
        c.psnr = psnr(images(c.call), exact)


def time_in_turn(
    found: list[Candidate], x: Tensor, t: Tensor, sums: dict[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
    """Time every candidate, and every sum of products: the seconds of these."""
    works = {c.name: Work(functools.partial(c.call, x, t)) for c in found}
    works |= {f"products {dtype}": Work(run) for dtype, run in sums.items()}
    turns = Turns(works, settle=True, uncounted=1).run(rounds)
    for c in found:
        c.seconds, c.cpu_seconds = turns.seconds[c.name], turns.cpu_seconds[c.name]
    return {dtype: turns.seconds[f"products {dtype}"] for dtype in sums}


def show(
    console: Console, batch: int, found: list[Candidate], alone: dict[str, list[float]]
) -> None:
    """The table of one batch size."""
    table = Table(title=f"one evaluation, batch {batch}", caption=machine.caption())
    for heading in (
        "candidate",
        "ms",
        "best ms",
        "cpu ms",
        "/ products",
        "/ eager",
        "error",
        "PSNR dB",
    ):
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    table.add_column("first step s", justify="right")
    table.add_column("memory MB", justify="right")
    base = next((c for c in found if c.name == "eager"), found[0])
    for c in sorted(found, key=lambda c: statistics.median(c.seconds)):
        table.add_row(
            c.name,
            f"{statistics.median(c.seconds) * 1e3:.1f}",
            f"{min(c.seconds) * 1e3:.1f}",
            f"{min(c.cpu_seconds) * 1e3:.1f}",
            f"{ratio(c.seconds, alone[c.dtype]):.2f}" if c.dtype in alone else "",
            f"{ratio(c.seconds, base.seconds):.2f}",
            f"{c.error:.1e}",
            "" if math.isnan(c.psnr) else f"{c.psnr:.1f}",
            f"{c.first_step:.1f}",
            f"{c.memory / 2**20:.0f}",
        )
    for dtype, seconds in alone.items():
        table.add_row(
            f"products {dtype}", f"{statistics.median(seconds) * 1e3:.1f}",
            f"{min(seconds) * 1e3:.1f}", "", "1.00",
        )  # fmt: skip
    console.print(table)
    for dtype in PRECISIONS:
        peers = [c for c in found if c.dtype == dtype and c.name not in OURS]
        ours = next((c for c in found if c.name == f"stepfuse-{dtype}"), None)
        if peers and ours is not None:
            fastest = min(peers, key=lambda c: statistics.median(c.seconds))
            console.print(
                f"{dtype}: {ratio(ours.seconds, fastest.seconds):.2f}x the time of {fastest.name}"
            )


def as_json(batch: int, found: list[Candidate], alone: dict[str, list[float]]) -> dict[str, Any]:
    rows = [{k: v for k, v in vars(c).items() if k != "call"} for c in found]
    return {"batch": batch, "candidates": rows, "products_seconds": alone}


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = script.parser(__doc__, rounds=15)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="what is evaluated")
    parser.add_argument("--config", type=Path, help="JSON of a diffusers UNet2DModel, instead")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    names = [peer.name for peer in PEERS]
    quick = [name for name in names if not name.startswith("inductor")]
    parser.add_argument(
        "--peers", nargs="*", choices=[*names, "all"], default=quick, metavar="NAME",
        help=f"of {', '.join(names)}, or all; inductor's take a minute each: not the default",
    )  # fmt: skip
    parser.add_argument("--no-images", action="store_true", help="leave the PSNR of images out")
    parser.add_argument("--memory", action="store_true", help="each candidate in its own process")
    options = script.parsed(parser)
    options.peers = names if "all" in options.peers else options.peers
    if min(options.batch) < 1:
        parser.error(f"--batch must be at least 1; got {min(options.batch)}")
    return options


@torch.no_grad()
def main() -> None:
    """Command line."""
    options = arguments()
    peers_setup.prepare()
    config = json.loads(read_text(options.config)) if options.config else None
    console, results = script.console(), []
    for batch in options.batch:
        model, shape = network(options.model, config, batch)
        x, t = inputs(shape)
        found = verified(candidates(model, x, t, options.peers), model, x, t)
        if not found:
            to_stderr(f"batch {batch}: nothing runs here, and nothing is timed")
            continue
        alone = time_in_turn(found, x, t, sums_of_products(model, x, t), options.rounds)
        if batch <= MOST_IMAGES and not options.no_images:
            compare_images(found, model, x)
        show(console, batch, found, alone)
        results.append(as_json(batch, found, alone))
        names = [c.name for c in found]
        del model, found
        if options.memory:
            names += [name for name in OURS if name not in names]
            job = {"model": options.model, "config": config, "batch": batch}
            memory = unet_memory.in_processes(names, job | {"threads": options.threads})
            console.print(unet_memory.table(memory, batch))
            results[-1]["memory"] = memory
    document = {"machine": machine.brief(), "model": options.model, "config": config}
    script.save(options.json, document | {"results": results})


if __name__ == "__main__":
    main()
