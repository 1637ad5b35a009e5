"""What the line of progress says, and the sentences above it."""

from __future__ import annotations

from stepfuse.engine.generate import shards
from stepfuse.engine.generate.reports.meter import Reading
from stepfuse.engine.generate.watching import Begun
from stepfuse.engine.generate.words import many

NAMED = 8  # more workers than these are summarised
_LONGEST = 500  # characters of an error


def status(reading: Reading, width: int | None = None) -> str:
    """One line, of ``width`` characters at most:

    12,345/50,000  35.1/s (w0 17.6 w1 17.5)  ETA 18 min  writer 3 %  failed 0

    Where workers do not fit one by one they are summarised, or left out; then the line is cut.
    """
    lines = [
        _joined(reading, f"{per_second(reading.rate)}/s{workers}", f"ETA {_eta(reading)}")
        for workers in (_one_by_one(reading), _summary(reading), "")
        if workers is not None
    ]
    return next((line for line in lines if width is None or len(line) <= width), lines[-1])[:width]


def conclusion(reading: Reading, width: int | None = None) -> str:
    """The same of a run that is over: its mean rate and how long it took."""
    return _joined(reading, f"{per_second(reading.mean)}/s", f"in {duration(reading.seconds)}")[
        :width
    ]


def beginning(begun: Begun) -> str:
    """What a run is about to do."""
    return (
        f"{plain(begun.url)}: {begun.images_done:,} of {many(begun.images, 'image')} done, "
        f"{begun.shards_asked:,} of {many(begun.shards, 'shard')} to be made by "
        f"{many(begun.workers, 'worker')} of {many(begun.threads, 'thread')}"
    )


def failure(shard: int, attempt: int, error: str, final: bool) -> str:
    """What went wrong, in one line."""
    what = f"shard {shards.name(shard)} failed (attempt {attempt:,}"
    return f"{what}{', the last' if final else ''}): {plain(error)[:_LONGEST]}"


def plain(text: str) -> str:
    """In one line, without what moves the cursor or changes colours."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def per_second(rate: float) -> str:
    """A rate with about three digits: 1,234, 35.1, 0.042."""
    if rate >= 999.5:
        return f"{rate:,.0f}"
    return f"{rate:.1f}" if rate >= 0.95 or rate == 0 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """In words: 45 s, 18 min, 5 h 20 min, 12 days."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds / 86400:,.0f} days"


def _joined(reading: Reading, speed: str, when: str) -> str:
    share = reading.writer_share
    writer = "writer-bound" if reading.writer_bound else "writer"
    return "  ".join(
        (
            f"{reading.images:,}/{reading.images_wanted:,}",
            speed,
            when,
            f"{writer} {'-' if share is None else f'{100 * share:.0f} %'}",
            f"failed {reading.shards_failed:,}",
        )
    )


def _eta(reading: Reading) -> str:
    return "unknown" if reading.eta is None else duration(reading.eta)


def _one_by_one(reading: Reading) -> str | None:
    """In brackets; None for too many. A dash stands for one that is not running."""
    rates = reading.workers
    if len(rates) > NAMED:
        return None
    words = (f"w{k} {'-' if rate is None else per_second(rate)}" for k, rate in rates.items())
    return f" ({' '.join(words)})" if rates else ""


def _summary(reading: Reading) -> str | None:
    rates = [rate for rate in reading.workers.values() if rate is not None]
    everybody = len(reading.workers)
    if everybody < 2:
        return None
    who = f"{len(rates):,} of {everybody:,}" if len(rates) < everybody else f"{everybody:,}"
    spread = f" {per_second(min(rates))} .. {per_second(max(rates))}" if rates else ""
    return f" ({who} workers{spread})"
