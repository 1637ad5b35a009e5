"""``stepfuse generate``: the work, and what is said about it."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from stepfuse.engine.cli.errors import Problem, describe
from stepfuse.engine.generate.api import make
from stepfuse.engine.generate.create import Created, TrialFailed, create
from stepfuse.engine.generate.job import Job, WeightsDiffer, open_job
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
from stepfuse.engine.generate.run import How, reached
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.trial import Tried
from stepfuse.engine.generate.watching import Watcher

_SHOWN = 20  # numbers of failed shards in a line

# what job.json says of a job that is there
_NOT_OF_A_JOB = (
    "model", "seed", "steps", "method", "eta", "spacing", "guidance", "labels", "label",
    "per_class", "conditions", "per_row", "optimize", "batch_size", "threads", "out", "format",
    "image", "quality", "level", "rounding", "shard_size", "features", "memory", "dry_run", "price",
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
    settings: Settings, count: int, out: str, how: How, watch: Watch, memory: int | None
) -> int:
    """Make a job, or find it there, and run it; the exit status."""
    with ending(out), reached(how):
        created = _create(settings, count, out, how, memory)
        return _run(created.job, how, watch)


def resume(where: str, count: int | None, how: How, watch: Watch) -> int:
    """Go on with a job; the exit status."""
    with ending(where), reached(how):
        return _run(open_job(where), how, watch, count)


def estimate(
    settings: Settings,
    count: int,
    out: str | None,
    workers: int | None,
    memory: int | None,
    price: float | None,
) -> int:
    """Try a new job out and say what it would take; nothing is written."""
    from stepfuse.engine.generate.estimate import estimated

    with ending(out or "."):
        told = _Tried()
        found = estimated(settings, count, workers, memory, told)
        told.end()
        console = Console(highlight=False)
        for name, value in found.lines(price):
            console.print(f"{name:<12}{value}", soft_wrap=True)
        return 0


@contextlib.contextmanager
def ending(where: str) -> Iterator[None]:
    """Errors with the exit statuses of this command, which schedulers read."""
    try:
        yield
    except KeyboardInterrupt as error:
        # SIGTERM while nothing was being made yet is SIGTERM all the same
        status = 130 if type(error) is KeyboardInterrupt else PREEMPTED
        raise Problem(f"stopped; {_again(where)}", status) from None
    except (TrialFailed, WeightsDiffer) as error:
        raise Problem(str(error), USAGE if isinstance(error, ValueError) else FAILURE) from error
    except OSError as error:
        raise Problem(describe(error)[0], DISK) from error


def _create(settings: Settings, count: int, out: str, how: How, memory: int | None) -> Created:
    told = _Tried()
    created = create(
        settings,
        count,
        open_place(out),
        workers=how.workers,
        memory=memory,
        force=how.force,
        tell=told,
    )
    told.end()
    if not created.new:
        _say(f"{out} holds this job already: going on with it")
    return created


def _run(job: Job, how: How, watch: Watch, count: int | None = None) -> int:
    with contextlib.closing(_Ending(watch.watchers())) as watchers:
        outcome = make(job, how, watchers.watcher, count)
    job = open_job(job.place)
    tell(job, outcome)
    return outcome.status


def tell(job: Job, outcome: Outcome) -> None:
    """The last lines: what there is, and the command that continues."""
    console = Console(highlight=False)
    where = Text(job.place.url, style="bold")
    if not outcome.status and not outcome.left:
        console.print(
            where.append(
                f": {job.n:,} images in {len(job.shards):,} shards, complete "
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
        where.append(f": {done:,} of {len(job.shards):,} shards are there", style="not bold"),
        soft_wrap=True,
    )
    console.print(_again(job.place.url), soft_wrap=True)


def _again(where: str) -> str:
    return f"stepfuse generate {shlex.quote(where)} goes on"


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)


class _Ending:
    """Watchers whose `end` is called, also where a run never began."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def close(self) -> None:
        """Idempotent, as every watcher's `end` is."""
        self.watcher.end()


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
