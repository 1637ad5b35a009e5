"""One sampler, asked by two threads on two streams."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from stepfuse.bench.gpu_check.check import Context
from stepfuse.bench.gpu_check.digits import Digits, largest
from stepfuse.bench.gpu_check.parts import in_a_line

TURNS = 4  # of each thread


def two_threads(context: Context, digits: Digits) -> None:
    """Each gets the images that it would get alone: the static buffers are one call's at a time."""
    count, steps = context.sized(16, 2), context.sized(20, 2)
    turns = context.sized(TURNS, 1)
    sampler = digits.sampler(graph="step", steps=steps, eta=0.5)
    seeds = {thread: range(100 * thread, 100 * thread + turns) for thread in (1, 2)}
    alone = {seed: digits.draw(sampler, count, seed=seed) for s in seeds.values() for seed in s}
    context.synchronize()
    found: dict[int, Tensor] = {}
    failed: list[str] = []
    together = threading.Barrier(2)

    def work(mine: range) -> None:
        try:
            with own_stream(context.device):
                together.wait(timeout=60)
                for seed in mine:
                    found[seed] = digits.draw(sampler, count, seed=seed)
        except Exception as error:
            failed.append(in_a_line(error))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in seeds.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    context.synchronize()
    context.expect(not failed, f"two threads: {'; '.join(failed)}")
    for seed, images in found.items():
        context.expect(
            torch.equal(images, alone[seed]),
            f"two threads, seed {seed}: off by {largest(images, alone[seed]):.3g}",
        )


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Inside, work goes to a stream of its own, which is waited for at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
