"""``--metrics``: a file for the textfile collector of Prometheus's node_exporter."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stepfuse.engine.files.writing import check_file, write_file
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.reports.meter import Reading
from stepfuse.engine.generate.reports.outlet import Outlet
from stepfuse.engine.generate.reports.report import Every, Report
from stepfuse.engine.generate.watching import Begun

ENDING = ".prom"
PERIOD = 5.0  # seconds

IMAGES = "Images of the job whose shards are in place."
RATE = "Images that the workers of this run finish now."
DONE = "Shards of the job that are in place."
FAILED = "Shards that this run has given up."
SHARDS = "Shards of the job."
WAIT = "Time for which sampling was held up by the writer, over all workers of this run."
UP = "Whether a worker of this run has loaded its network and runs."


class Metrics(Report):
    """A `Watcher` that keeps a file up to date: at begin and end, and every few seconds.

    Args:
        path: of the file, which appears whole or not at all.
        tell: is given one sentence when it cannot be written; it is tried again later.
        clock: seconds since any time, never going back.

    Raises ValueError for a name that node_exporter ignores, OSError for a file that cannot be
    written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tell: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(clock)
        self._path = Path(path)
        if self._path.suffix != ENDING:
            raise ValueError(
                f"--metrics must end in {ENDING}, node_exporter reads no others; "
                f"got {os.fspath(path)!r}"
            )
        check_file(self._path)
        self._tell = tell or (lambda sentence: Outlet(sys.stderr).write(f"{sentence}\n"))
        self._period = Every(PERIOD, clock)
        self._told = False

    def begin(self, begun: Begun) -> None:
        """Write it."""
        super().begin(begun)
        self._write()

    def shard(self, worker: int, record: Record) -> None:
        """Write it when it is time."""
        super().shard(worker, record)
        self._write_if_due()

    def tick(self) -> None:
        """Write it when it is time."""
        super().tick()
        self._write_if_due()

    def end(self) -> None:
        """Write it a last time."""
        super().end()
        self._write()

    def _write_if_due(self) -> None:
        if self._period.due():
            self._write()

    def _write(self) -> None:
        self._period.restart()
        content = exposition(self.meter.begun.url, self.meter.read())
        try:
            write_file(self._path, content.encode("utf-8"))
        except OSError as error:
            if not self._told:
                self._told = True  # before it: whoever is told may tell us
                self._tell(f"--metrics {self._path}: not written: {error.strerror or error}")


def exposition(url: str, reading: Reading) -> str:
    """The text format of Prometheus, every metric with its help, its type and the job's label."""
    job = f'job="{escaped(url)}"'
    lines = []
    for name, kind, about, value in (
        ("images_total", "counter", IMAGES, reading.images_in_place),
        ("images_per_second", "gauge", RATE, round(reading.rate, 6)),
        ("shards_done", "gauge", DONE, reading.shards_done),
        ("shards_failed", "gauge", FAILED, reading.shards_failed),
        ("shards_total", "gauge", SHARDS, reading.shards),
        ("writer_wait_seconds", "counter", WAIT, round(reading.writer_wait, 6)),
    ):
        lines += [*_head(name, kind, about), f"stepfuse_{name}{{{job}}} {value!r}"]
    lines += _head("worker_up", "gauge", UP)
    for worker, rate in reading.workers.items():
        lines.append(f'stepfuse_worker_up{{{job},worker="{worker}"}} {int(rate is not None)}')
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """As the value of a label, inside its quotes; what is no Unicode, in a path say, as escapes."""
    known = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return known.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _head(name: str, kind: str, about: str) -> tuple[str, str]:
    return f"# HELP stepfuse_{name} {about}", f"# TYPE stepfuse_{name} {kind}"
