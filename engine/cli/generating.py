"""``stepfuse generate``: the work, and what is said about it."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from stepfuse.engine.cli.errors import INTERRUPTED, Problem, describe
from stepfuse.engine.generate.api import make
from stepfuse.engine.generate.create import Created, TrialFailed, create
from stepfuse.engine.generate.job import Job, WeightsDiffer, exists, open_job
from stepfuse.engine.generate.outcome import (
    DISK,
    FAILURE,
    POISONED,
    PREEMPTED,
    USAGE,
    Outcome,
)
from stepfuse.engine.generate.place import open_place
from stepfuse.engine.generate.reports.json_log import JsonLog
from stepfuse.engine.generate.reports.line import Line
from stepfuse.engine.generate.reports.lines import Lines
from stepfuse.engine.generate.reports.prometheus import Metrics
from stepfuse.engine.generate.reports.several import Several
from stepfuse.engine.generate.run import How, check_shared, reached
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.trial import Tried
from stepfuse.engine.generate.watching import Watcher
from stepfuse.engine.generate.words import many

_SHOWN = 20  # numbers of failed shards in a line

# what job.json says of a job that is there
_NOT_OF_A_JOB = (
    "model", "seed", "steps", "method", "eta", "spacing", "order", "solver_type", "grid",
    "guidance", "labels", "label", "per_class", "conditions", "per_row", "optimize", "batch_size",
    "threads", "out", "format", "image", "quality", "level", "rounding", "shard_size", "features",
    "memory", "dry_run", "price_per_hour",
)  # fmt: skip


@dataclass(frozen=True)
class Watch:
    """Where a run is reported beside the terminal."""

    log_json: str | None
    metrics: Path | None

    def watchers(self) -> Several:
        """All of them; raises where a file cannot be written."""
        line: Watcher = Line(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)
        found: list[Watcher] = [line]
        if self.log_json is not None:
            found.append(JsonLog(self.log_json))
        if self.metrics is not None:
            found.append(Metrics(self.metrics))
        return Several(*found)


def _bytes(memory: float | None) -> int | None:
    """--memory, which is in GB."""
    return None if memory is None else int(_positive("--memory", memory) * 1e9)


def check_price(price: float | None, dry_run: bool) -> None:
    """Raise ValueError for a --price-per-hour that is none, or that nobody would look at."""
    if price is not None:
        _positive("--price-per-hour", price)
        if not dry_run:
            raise ValueError(f"--price-per-hour {price:g} is for --dry-run")


def _positive(option: str, value: float) -> float:
    if not 0 < value < 1e12:
        raise ValueError(f"{option} must be more than 0 and less than 1e12; got {value:g}")
    return value


def refuse_given(context: typer.Context) -> None:
    """Raise ValueError for the first option on the command line that job.json has."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in _NOT_OF_A_JOB and source is not None and source.name == "COMMANDLINE":
            raise ValueError(
                f"{parameter.opts[0]} is not for a job that is there: its settings are in "
                "job.json; accepted beside RUN: -n, and how it runs"
            )


def begin(
    settings: Settings, count: int, out: str, how: How, watch: Watch, memory: float | None
) -> int:
    """Make a job, or find it there, and run it; the exit status."""
    with ending(out), reached(how):
        watchers = watch.watchers()
        created = _create(settings, count, out, how, _bytes(memory))
        return _run(created.job, how, watchers)


def resume(where: str, count: int | None, how: How, watch: Watch) -> int:
    """Go on with a job; the exit status."""
    with ending(where), reached(how):
        return _run(open_job(where), how, watch.watchers(), count)


def estimate(
    settings: Settings,
    count: int,
    out: str | None,
    workers: int | None,
    memory: float | None,
    price: float | None,
) -> int:
    """Try a new job out and say what it would take; nothing is written."""
    from stepfuse.engine.generate.estimate import estimated

    with ending(out or "."):
        told = _Tried()
        found = estimated(settings, count, workers, _bytes(memory), told)
        told.end()
        console = Console(highlight=False)
        for name, value in found.lines(price):
            console.print(f"{name:<12}{value}", soft_wrap=True)
        return 0


@contextlib.contextmanager
def ending(where: str) -> Iterator[None]:
    """Errors with the exit statuses of this command, which schedulers read."""
    try:
        with _warned():
            yield
    except KeyboardInterrupt as error:
        # SIGTERM while nothing was being made yet is SIGTERM all the same
        status = INTERRUPTED if type(error) is KeyboardInterrupt else PREEMPTED
        left = _again(where) if _is_there(where) else "the same command begins again"
        raise Problem(f"stopped; {left}", status) from None
    except (TrialFailed, WeightsDiffer) as error:
        raise Problem(str(error), USAGE if isinstance(error, ValueError) else FAILURE) from error
    except OSError as error:
        raise Problem(describe(error)[0], DISK) from error


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """Inside, SIGUSR1, with which SLURM warns of SIGTERM, is SIGTERM."""
    number = getattr(signal, "SIGUSR1", None)
    main = threading.current_thread() is threading.main_thread()
    if number is None or not main or signal.getsignal(number) is not signal.SIG_DFL:
        yield
        return
    signal.signal(number, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


def _is_there(where: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return exists(open_place(where))
    return False


def _create(settings: Settings, count: int, out: str, how: How, memory: int | None) -> Created:
    told = _Tried()
    place = open_place(out)
    check_shared(place)
    created = create(
        settings,
        count,
        place,
        workers=how.workers,
        memory=memory,
        force=how.force,
        tell=told,
    )
    told.end()
    if not created.new:
        _say(f"{out} holds this job already: going on with it")
    return created


def _run(job: Job, how: How, watcher: Watcher, count: int | None = None) -> int:
    try:
        outcome = make(job, how, watcher, count)
    finally:
        watcher.end()  # also where it never began
    job = open_job(job.place)
    tell(job, outcome)
    if outcome.status == INTERRUPTED:
        raise Problem("", INTERRUPTED)  # nothing is said after the command that goes on
    return outcome.status


def tell(job: Job, outcome: Outcome) -> None:
    """The last lines: what there is, and the command that continues."""
    console = Console(highlight=False)
    where = Text(job.place.url, style="bold")
    if not outcome.status and not outcome.left:
        console.print(
            where.append(
                f": {many(job.n, 'image')} in {many(len(job.shards), 'shard')}, complete "
                f"({job.format.name}, batches of {job.settings.batch_size})",
                style="not bold",
            ),
            soft_wrap=True,
        )
        return
    if outcome.reason:
        _say(outcome.reason)
    if outcome.status == POISONED and outcome.failed:
        numbers = sorted(outcome.failed)
        shown = ", ".join(map(str, numbers[:_SHOWN]))
        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        first = numbers[0]
        _say(
            f"failed three times: shards {shown}{more}; shard {first}: {outcome.failed[first]} "
            f"({job.place.url}/{job.failed_name(first)})"
        )
    done = len(job.shards) - outcome.left
    console.print(
        where.append(f": {done:,} of {many(len(job.shards), 'shard')} there", style="not bold"),
        soft_wrap=True,
    )
    console.print(_again(job.place.url), soft_wrap=True)


def _again(where: str) -> str:
    return f"stepfuse generate {shlex.quote(where)} goes on"


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)


class _Tried:
    """The table of a trial, a line as each batch size has been tried."""

    def __init__(self) -> None:
        self.rows: list[Tried] = []

    def __call__(self, tried: Tried) -> Any:
        if not self.rows:
            _say("images at a time   images/s of one worker   memory")
        self.rows.append(tried)
        _say(
            f"{tried.batch_size:>16}   {tried.images_per_s:>22.3g}   "
            f"{tried.peak_bytes / 1e6:,.0f} MB"
        )

    def end(self) -> None:
        """Say which it is."""
