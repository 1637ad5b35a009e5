"""``--log-json``: what happens, for programs to read."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.reports.meter import Reading
from stepfuse.engine.generate.reports.outlet import Outlet
from stepfuse.engine.generate.reports.report import Every, Report
from stepfuse.engine.generate.watching import Begun

STDOUT = "-"
PERIOD = 30.0  # seconds


class JsonLog(Report):
    """A `Watcher` that writes a JSON object a line: time, event, and the fields of the event.

    Events are begin, up, shard, failed, note and end, and progress every half a minute, in which
    the finished batches are told of together. Lines are appended, each at once.

    Args:
        where: a file, or "-" for stdout.
        tell: is given one sentence when a line cannot be written; later lines are tried again.
        clock: seconds since any time, never going back.
        now: seconds since 1970, UTC.

    Raises OSError for a file that cannot be opened.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        tell: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(clock)
        self._where = os.fspath(where)
        self._tell = tell or (lambda sentence: Outlet(sys.stderr).write(f"{sentence}\n"))
        self._now = now
        self._period = Every(PERIOD, clock)
        self._told = False
        self._appended = _Stdout() if self._where == STDOUT else _Appended(self._where)

    def begin(self, begun: Begun) -> None:
        """event "begin" with the fields of `Begun`."""
        super().begin(begun)
        self._period.restart()
        self._log("begin", asdict(begun))

    def up(self, worker: int, running: bool) -> None:
        """event "up"."""
        super().up(worker, running)
        self._log("up", {"worker": worker, "running": running})

    def shard(self, worker: int, record: Record) -> None:
        """event "shard" with the fields of the record but for the images' checksums."""
        super().shard(worker, record)
        fields = asdict(record) | {"images_per_s": round(record.images_per_s, 3)}
        del fields["crc32"]
        self._log("shard", {"worker": worker} | fields)

    def failed(self, shard: int, attempt: int, error: str, final: bool) -> None:
        """event "failed"."""
        super().failed(shard, attempt, error, final)
        self._log("failed", {"shard": shard, "attempt": attempt, "error": error, "final": final})

    def note(self, text: str) -> None:
        """event "note"."""
        self._log("note", {"text": text})

    def tick(self) -> None:
        """event "progress" when it is time."""
        super().tick()
        if self._period.due():
            self._log("progress", _fields(self.meter.read()))

    def end(self) -> None:
        """event "end", with the fields of "progress"."""
        super().end()
        self._log("end", _fields(self.meter.read()))
        self._appended.close()

    def _log(self, event: str, fields: dict[str, Any]) -> None:
        time_ = datetime.fromtimestamp(self._now(), timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time_.replace("+00:00", "Z"), "event": event} | fields)
        try:
            self._appended.write(line.encode("ascii") + b"\n")
        except (OSError, ValueError) as error:
            if not self._told:
                self._told = True  # before it: whoever is told may tell us
                why = getattr(error, "strerror", None) or str(error)
                self._tell(f"--log-json {self._where}: a line is lost: {why}")


def _fields(reading: Reading) -> dict[str, Any]:
    return {
        "images": reading.images,
        "images_in_place": reading.images_in_place,
        "images_wanted": reading.images_wanted,
        "images_per_s": round(reading.rate, 3),
        "mean_images_per_s": round(reading.mean, 3),
        "workers": {
            str(worker): None if rate is None else round(rate, 3)
            for worker, rate in reading.workers.items()
        },
        "eta_s": None if reading.eta is None else round(reading.eta, 1),
        "seconds": round(reading.seconds, 3),
        "writer_wait": round(reading.writer_wait, 3),
        "writer_share": None if reading.writer_share is None else round(reading.writer_share, 4),
        "shards_done": reading.shards_done,
        "shards_failed": reading.shards_failed,
        "shards": reading.shards,
    }


class _Appended:
    """A file at whose end whole lines are written, also where there is half a line."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._half = False
        self._open()

    def write(self, line: bytes) -> None:
        if self._file.closed:
            self._open()
        rest = b"\n" + line if self._half else line
        while rest:
            written = self._file.write(rest) or 0  # None: a pipe that must not block is full
            if not written:
                raise BlockingIOError("it takes no more at the moment")
            rest = rest[written:]
            self._half = bool(rest)

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self._half = False
        if os.path.isfile(self._path) and os.path.getsize(self._path):
            # where nothing may be read nobody knows
            with contextlib.suppress(OSError), open(self._path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                self._half = file.read(1) != b"\n"


class _Stdout:
    """stdout, as it is when a line is written."""

    def write(self, line: bytes) -> None:
        if sys.stdout is None:
            raise ValueError("there is no stdout")
        sys.stdout.write(line.decode("ascii"))
        sys.stdout.flush()

    def close(self) -> None:
        """It is others', too."""
