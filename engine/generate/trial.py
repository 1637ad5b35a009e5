"""A short trial of a new job: how many images at a time, how fast, how large, and which kernels.

It runs in a process of its own, as a worker would: with its cores, threads and device.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepfuse.engine.compile.heap import returning
from stepfuse.engine.compile.timings import Timings
from stepfuse.engine.generate.conditions.row import Row
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.source import Source, open_source
from stepfuse.engine.generate.worker import Worker

GAIN = 1.03  # less than this for twice the images at a time is none
LARGEST_BATCH = 1024
_LOOPS = 2
_STEPS = 4  # of a trial's loop: every step costs the same
_SAMPLES = 16  # images that are encoded to see how large they are
_GUIDED = 2.0  # any scale but 1, which needs no second evaluation


@dataclass(frozen=True)
class Tried:
    """One batch size: whole images per second, and the most memory so far, in bytes."""

    batch_size: int
    images_per_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Depth:
    """How far a trial goes: whether twice the images are tried too.

    Attributes:
        gain: in images per second, that the last doubling must have had.
        seconds: that trying the last number may have taken.
        bytes: of memory, beyond which a smaller process on the CPU is not taken.
    """

    gain: float
    seconds: float
    bytes: float = math.inf


THOROUGH = Depth(GAIN, 20.0)
LOOK = Depth(1.125, 1.5, 300e6)


@dataclass(frozen=True)
class Found:
    """What a trial says of one worker.

    Attributes:
        batch_size: the one to take.
        images_per_s: with it.
        peak_bytes: of memory.
        bytes_per_image: as it is written.
        timings: of the compiler's trials, as `Timings.to_json` writes them.
    """

    batch_size: int
    images_per_s: float
    peak_bytes: int
    bytes_per_image: float
    timings: str


def measure(
    settings: Settings,
    n: int,
    device: str,
    memory: int | None,
    depth: Depth = THOROUGH,
    tell: Callable[[Tried], Any] = lambda tried: None,
) -> Found:
    """Try 1, 2, 4 ... images at a time, or the number that is asked for, in this process.

    Larger batches are tried as ``depth`` says, within ``memory`` bytes and up to ``n`` images. Then
    the network is compiled for the batch that won, under the eyes of the `Timings` that every
    worker will replay.
    """
    trial = _Trial(settings, torch.device(device))
    best: Tried | None = None
    before: Tried | None = None
    size = settings.batch_size or 1
    while True:
        tried, seconds = trial.loop(size)
        tell(tried)
        too_large = memory is not None and tried.peak_bytes > memory
        gain = depth.gain if best is None else tried.images_per_s / best.images_per_s
        grown = 0 if before is None else 3 * tried.peak_bytes - 2 * before.peak_bytes
        before = tried
        if best is None or (gain > GAIN and not too_large):
            best = tried
        size *= 2
        if settings.batch_size or too_large or size > min(n, LARGEST_BATCH):
            break
        if gain < depth.gain or seconds > depth.seconds:
            break
        if torch.device(device).type == "cpu" and tried.peak_bytes <= depth.bytes < grown:
            break  # twice the images take twice what these took more than half of them
        if settings.shard_size is not None and settings.shard_size % size:
            break  # no batch crosses a shard
    return trial.settle(best)


class _Trial:
    """A network that is loaded once for all batch sizes."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.source = _loaded_once(open_source(settings.model))

    def loop(self, size: int) -> tuple[Tried, float]:
        """Time a few steps of ``size`` images; also the seconds that it all took."""
        begun = time.perf_counter()
        worker = self._worker(size)
        sampler = worker.sampler(None)
        evaluations = len(sampler.timesteps)
        points = list(dict.fromkeys(sampler.timesteps))  # some are asked for twice
        steps = points[:: max(1, len(points) // _STEPS)][:_STEPS]
        sampler.set_timesteps(timesteps=steps)
        numbers, rows = range(size), self._rows(size)
        with returning():  # or the largest batch's first step decides how large the process is
            worker.sample(numbers, rows)  # warm: compiled, recorded
        best = float("inf")
        for _ in range(_LOOPS):
            start = time.perf_counter()
            worker.sample(numbers, rows)
            self._finish()
            best = min(best, time.perf_counter() - start)
        seconds = best * evaluations / len(sampler.timesteps)
        tried = Tried(size, size / seconds, _peak(self.device))
        return tried, time.perf_counter() - begun

    def settle(self, tried: Tried) -> Found:
        """Compile and record for the batch size that won, and see how large its images are."""
        timings = Timings()
        count = min(_SAMPLES, tried.batch_size)
        with timings.recording():
            worker = self._worker(tried.batch_size)
            rows = self._rows(tried.batch_size)
            made = [image for batch in worker.images(rows, 0, count) for image in batch]
            if self.source.num_classes is not None:
                for guidance in (1.0, _GUIDED):  # as rows of a file may ask for
                    if self.settings.conditions is not None:
                        worker.sample(range(tried.batch_size), rows, guidance)
        format = self.settings.output()
        sizes = [len(format.encode(image)) for image in made]
        return Found(
            batch_size=tried.batch_size,
            images_per_s=tried.images_per_s,
            peak_bytes=max(tried.peak_bytes, _peak(self.device)),
            bytes_per_image=sum(sizes) / len(sizes),
            timings=timings.to_json(),
        )

    def _worker(self, size: int) -> Worker:
        settings = replace(self.settings, batch_size=size, shard_size=None)
        return Worker(settings, self.source, self.device, None)

    def _rows(self, count: int) -> list[Row]:
        classes = self.source.num_classes
        return [Row(label=None if classes is None else i % classes) for i in range(count)]

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _loaded_once(source: Source) -> Source:
    """The source with its network loaded once, however often it is asked for."""
    model = source.load()
    return replace(source, load=lambda: model)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
