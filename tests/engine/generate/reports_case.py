"""A clock that goes when it is told to, and what a run tells its watchers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from stepfuse.engine.generate.record import Record, pack
from stepfuse.engine.generate.watching import Begun, Watcher

BEGUN = Begun(
    url="run/",
    images=50_000,
    shards=50,
    images_done=12_000,
    shards_done=12,
    shards_asked=38,
    images_asked=38_000,
    workers=2,
    threads=1,
)


class Clock:
    """Seconds, from a time that is not 0."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        """The time now."""
        return self.time

    def go(self, seconds: float) -> None:
        """Let time go by."""
        self.time += seconds


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        """It is."""
        return True


class Full(io.StringIO):
    """A stream that takes nothing: its reader is gone."""

    tries = 0

    def write(self, text: str) -> int:
        """Raise what a pipe without a reader raises."""
        self.tries += 1
        raise BrokenPipeError(32, "Broken pipe")


def begun(**fields: Any) -> Begun:
    """`BEGUN` with other fields."""
    return replace(BEGUN, **fields)


def record(shard: int = 12, count: int = 1000, seconds: float = 50.0, wait: float = 1.5) -> Record:
    """A shard that is done."""
    return Record(
        shard=shard,
        first=shard * 1000,
        count=count,
        bytes=2_000_000,
        sha256="ab" * 32,
        fingerprint={"isa": "avx2"},
        host="node1",
        seconds=seconds,
        writer_wait=wait,
        attempt=1,
        crc32=pack([7] * count),
    )


def work(
    watcher: Any,
    clock: Clock,
    seconds: float,
    rates: Sequence[float],
    batch: int = 8,
    ticks: Callable[[], object] | None = None,
) -> None:
    """Let workers finish batches at these rates for so long, with a tick every half a second.

    ``ticks`` is called after every tick.
    """
    start, step = clock.time, 0.05
    next_ = [batch / rate if rate else float("inf") for rate in rates]
    tick = 0.5
    for number in range(1, round(seconds / step) + 1):
        clock.time = start + number * step
        elapsed = number * step + 1e-9
        for worker, rate in enumerate(rates):
            while next_[worker] <= elapsed:
                watcher.made(worker, batch)
                next_[worker] += batch / rate
        if tick <= elapsed:
            watcher.tick()
            tick += 0.5
            if ticks is not None:
                ticks()


def calls(watcher: Watcher) -> dict[str, Callable[[], None]]:
    """Every call of the protocol, by its name."""
    return {
        "begin": lambda: watcher.begin(BEGUN),
        "up": lambda: watcher.up(0, True),
        "gone": lambda: watcher.up(0, False),
        "made": lambda: watcher.made(0, 8),
        "shard": lambda: watcher.shard(0, record()),
        "failed": lambda: watcher.failed(13, 3, "ValueError: no", True),
        "note": lambda: watcher.note("a word"),
        "tick": lambda: watcher.tick(),
        "end": lambda: watcher.end(),
    }


def in_many_orders(watcher: Watcher) -> None:
    """Every call before and after every other one, with begin and end at any place."""
    known = calls(watcher)
    for name in known:
        for other in known:
            known[name]()
            known[other]()
