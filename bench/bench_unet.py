"""One evaluation of a U-Net against every runtime: `python -m stepfuse.bench.bench_unet`.

A candidate is checked against the eager float32 network before it is timed, and left out where it
is wrong. All take turns in one run; medians and ratios of one round each are reported. "products"
is the sum of the network's own convolutions and linear layers, each timed alone in the same rounds
with packed weights: what remains when everything between them costs nothing. "cpu ms" is the least
processor time of an evaluation, all threads together: on a busy machine it tells more than the
clock, though a thread that waits by spinning counts too.
"""

from __future__ import annotations

import argparse
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
from stepfuse.bench import peers_setup
from stepfuse.bench.harness import machine
from stepfuse.bench.peers import PEERS, Call, Plain
from stepfuse.bench.products import products
from stepfuse.engine.optimize import optimize

# relative L2 to eager float32: sums in another order, and rounding to 8 bits through 60 layers
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2}
OURS = {"fp32": None, "bf16": torch.bfloat16}
TIMESTEP = 500
SETTLE_SECONDS = 0.02  # idle threads of the candidate before stop spinning


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


def cifar10() -> nn.Module:
    """diffusers' network in the size of DDPM for CIFAR-10: 35.7M, random weights."""
    return from_config(
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
        }
    )


def from_config(config: dict[str, Any]) -> nn.Module:
    """diffusers' UNet2DModel of a configuration, as its config.json holds it."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    network: nn.Module = UNet2DModel(**given).eval().requires_grad_(False)
    return network


def build(name: str, dtype: str, make: Callable[[], Call], x: Tensor, t: Tensor) -> Candidate:
    """Time from nothing to the first result, and the memory that it holds then."""
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    call = make()
    call(x, t)
    seconds = time.perf_counter() - start
    return Candidate(name, dtype, call, seconds, process.memory_info().rss - before)


def candidates(model: nn.Module, x: Tensor, t: Tensor, names: list[str]) -> list[Candidate]:
    """Ours, then the peers that were asked for and can run; the others are listed with a reason."""
    found = []
    timesteps = sf.spaced_timesteps(1000, 50)
    for dtype, precision in OURS.items():

        def make(precision: torch.dtype | None = precision) -> Call:
            return optimize(model, (x, t), precision, timesteps=[*timesteps, TIMESTEP])

        found.append(build(f"stepfuse-{dtype}", dtype, make, x, t))
    for peer in PEERS:
        if peer.name not in names:
            continue
        reason = peer.why_not()
        if not reason:
            try:
                found.append(
                    build(peer.name, peer.dtype, lambda p=peer: p.build(model, x, t), x, t)
                )
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason:
            Console(stderr=True).print(f"{peer.name} left out: {reason}")
    return found


def verified(found: list[Candidate], model: nn.Module, x: Tensor, t: Tensor) -> list[Candidate]:
    """Those whose result agrees with the eager network."""
    exact = model(x, t).double()
    for c in found:
        c.error = float((c.call(x, t).double() - exact).norm() / exact.norm())
    wrong = [c for c in found if not c.error <= TOLERANCE[c.dtype]]
    for c in wrong:
        Console(stderr=True).print(f"{c.name} left out: relative error {c.error:.2g}")
    return [c for c in found if c not in wrong]


def compare_images(found: list[Candidate], model: nn.Module, x: Tensor) -> None:
    """PSNR, in dB for a range of 2, of 50-step DDIM images to those of eager float32."""

    def images(call: Call) -> Tensor:
        sampler = sf.Sampler(lambda x, t: call(x, t), sf.Schedule.linear(), steps=50, graph=None)
        return sampler.sample(x.shape, seed=0)

    exact = images(model)
    for c in found:
        mean_square = float((images(c.call) - exact).square().mean())
        c.psnr = 10 * math.log10(4 / mean_square) if mean_square else math.inf


def alternate(
    found: list[Candidate], x: Tensor, t: Tensor, sums: dict[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Time every candidate and every sum of products in turn, each after an untimed call."""
    alone: dict[str, list[float]] = {name: [] for name in sums}
    for counted in range(-1, rounds):
        for c in found:
            time.sleep(SETTLE_SECONDS)
            c.call(x, t)
            start, busy = time.perf_counter(), time.process_time()
            c.call(x, t)
            if counted >= 0:
                c.seconds.append(time.perf_counter() - start)
                c.cpu_seconds.append(time.process_time() - busy)
        for name, run in sums.items():
            time.sleep(SETTLE_SECONDS)
            run()
            seconds = run()
            if counted >= 0:
                alone[name].append(seconds)
    return alone


def ratio(a: list[float], b: list[float]) -> float:
    """Median over the rounds of a / b."""
    return statistics.median(p / q for p, q in zip(a, b, strict=True))


def show(
    console: Console, batch: int, found: list[Candidate], alone: dict[str, list[float]]
) -> None:
    """The table of one batch size."""
    described = ", ".join(f"{k} {v}" for k, v in machine().items())
    table = Table(title=f"one evaluation, batch {batch}", caption=described)
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
            f"{ratio(c.seconds, alone[c.dtype]):.2f}",
            f"{ratio(c.seconds, base.seconds):.2f}",
            f"{c.error:.1e}",
            f"{c.psnr:.1f}",
            f"{c.first_step:.1f}",
            f"{c.memory / 2**20:.0f}",
        )
    for dtype, seconds in alone.items():
        table.add_row(
            f"products {dtype}", f"{statistics.median(seconds) * 1e3:.1f}",
            f"{min(seconds) * 1e3:.1f}", "", "1.00",
        )  # fmt: skip
    console.print(table)
    for dtype in OURS:
        peers = [c for c in found if c.dtype == dtype and not c.name.startswith("stepfuse")]
        ours = next((c for c in found if c.name == f"stepfuse-{dtype}"), None)
        if peers and ours is not None:
            fastest = min(peers, key=lambda c: statistics.median(c.seconds))
            console.print(
                f"{dtype}: {ratio(ours.seconds, fastest.seconds):.2f}x the time of {fastest.name}"
            )


def as_json(batch: int, found: list[Candidate], alone: dict[str, list[float]]) -> dict[str, Any]:
    rows = [{k: v for k, v in vars(c).items() if k != "call"} for c in found]
    return {"batch": batch, "candidates": rows, "products_seconds": alone}


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, help="JSON of a diffusers UNet2DModel")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of every candidate")
    names = [peer.name for peer in PEERS]
    quick = [name for name in names if not name.startswith("inductor")]
    parser.add_argument(
        "--peers", nargs="*", choices=names, default=quick, metavar="NAME",
        help=f"of {', '.join(names)}; the inductor ones take a minute each and are not the default",
    )  # fmt: skip
    parser.add_argument("--no-images", action="store_true", help="leave the PSNR of images out")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    peers_setup.prepare()
    if options.threads:
        torch.set_num_threads(options.threads)
    network = from_config(json.loads(options.config.read_text())) if options.config else cifar10()
    model = Plain(network).eval()
    size, channels = network.config.sample_size, network.config.in_channels
    console, results = Console(), []
    if not console.is_terminal:
        console.width = 120  # a file has no width of its own
    for batch in options.batch:
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, channels, size, size, generator=generator)
        t = torch.full((batch,), TIMESTEP)
        found = verified(candidates(model, x, t, options.peers), model, x, t)
        sums = {dtype: products(model, x, t, precision) for dtype, precision in OURS.items()}
        alone = alternate(found, x, t, sums, options.rounds)
        if not options.no_images:
            compare_images(found, model, x)
        show(console, batch, found, alone)
        results.append(as_json(batch, found, alone))
    if options.json:
        document = {"machine": machine(), "results": results}
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
