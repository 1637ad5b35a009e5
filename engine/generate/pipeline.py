"""From finished images to the file of a shard: encoded and written while the next are sampled."""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepfuse.engine.generate.encoders import Encoders
from stepfuse.engine.generate.formats.format import Format
from stepfuse.engine.generate.made import Made

_BATCHES = 2  # that wait for the writer; a full queue holds up the sampler
_PATIENCE = 0.2  # seconds between two looks at whether the other side still lives


@dataclass
class Written:
    """What came of a shard.

    Attributes:
        checksums: crc32 of every image's bytes, in order.
        waited: seconds that the sampler was held up by the writer.
    """

    checksums: list[int] = field(default_factory=list)
    waited: float = 0.0


def write_shard(
    format: Format,
    path: Path,
    batches: Iterable[list[Made]],
    count: int,
    watch: Callable[[list[Made]], Any] | None = None,
    encoders: Encoders | None = None,
) -> Written:
    """Make the file or folder ``path`` of ``count`` images; ``watch`` sees every list of them.

    Sampling goes on in this thread, writing in another, and encoding there too or by ``encoders``.
    Raises what either raises, after both have ended.
    """
    made, written = _Handover(), Written()

    def write() -> None:
        def encoded() -> Iterator[tuple[Made, bytes]]:
            encode = _encoded_by(format) if encoders is None else encoders.encoded
            for image, content in encode(made):
                written.checksums.append(zlib.crc32(content))
                yield image, content

        try:
            format.write(path, encoded(), count)
        except BaseException as error:  # it is raised where the shard was asked for
            made.failure = error

    writer = threading.Thread(target=write, name="stepfuse-writer", daemon=True)
    writer.start()
    try:
        for batch in batches:
            start = time.perf_counter()
            made.put(batch)
            written.waited += time.perf_counter() - start
            if watch is not None:
                watch(batch)
    except BaseException:
        made.stop()
        raise
    finally:
        made.close()
        start = time.perf_counter()
        writer.join()
        written.waited += time.perf_counter() - start
    if made.failure is not None:
        raise made.failure
    return written


def _encoded_by(format: Format) -> Callable[[Iterable[Made]], Iterator[tuple[Made, bytes]]]:
    return lambda images: ((image, format.encode(image)) for image in images)


class _Stopped(Exception):
    """The sampler has failed: what is written will not be needed."""


class _Handover:
    """A short queue of lists of images between two threads, either of which may fail."""

    def __init__(self) -> None:
        self._queue: queue.Queue[list[Made] | None] = queue.Queue(_BATCHES)
        self._stopped = threading.Event()
        self.failure: BaseException | None = None

    def put(self, batch: list[Made] | None) -> None:
        """Hand over; raises what the writer has raised."""
        while True:
            if self.failure is not None:
                raise self.failure
            try:
                self._queue.put(batch, timeout=_PATIENCE)
            except queue.Full:
                continue
            return

    def stop(self) -> None:
        """Let the writer end at once."""
        self._stopped.set()

    def close(self) -> None:
        """There will be no more."""
        while self.failure is None and not self._stopped.is_set():
            try:
                self._queue.put(None, timeout=_PATIENCE)
            except queue.Full:
                continue
            return

    def __iter__(self) -> Iterator[Made]:
        while True:
            try:
                batch = self._queue.get(timeout=_PATIENCE)
            except queue.Empty:
                if self._stopped.is_set():
                    raise _Stopped from None
                continue
            if self._stopped.is_set():
                raise _Stopped
            if batch is None:
                return
            yield from batch
