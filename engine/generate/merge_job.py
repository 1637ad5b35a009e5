"""All images of a job in one file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from stepfuse.engine.files.writing import check_file
from stepfuse.engine.generate.formats import Format
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.merge import merge_npz
from stepfuse.engine.generate.words import many

_CHANNELS = 3
_OVERHEAD = 4096  # bytes of headers, at most


def check_merge(job: Job, out: str | os.PathLike[str], force: bool = False) -> None:
    """Raise ValueError or OSError where `merge_job` could not begin, or would not fit."""
    missing = len(job.shards) - sum(job.done())
    if missing:
        raise ValueError(
            f"{job.place.url} lacks {missing} of {many(len(job.shards), 'shard')}; "
            f"`stepfuse generate {job.place.url}` makes them"
        )
    if job.format.takes != "pixels":
        raise ValueError(f"format {job.format.name} holds samples; only pixels can be merged")
    if os.path.lexists(out) and not force:
        raise ValueError(f"{os.fspath(out)} is there already; accepted: another name, or --force")
    check_file(out, merged_size(job))


def merged_size(job: Job) -> int:
    """Bytes of the merged file, about."""
    height, width = map(int, job.identity["sample_shape"][1:])
    return job.n * (height * width * _CHANNELS + 8 * has_labels(job)) + _OVERHEAD


def has_labels(job: Job) -> bool:
    """Whether the model has classes; it need not be there."""
    conditions = job.identity["conditions"]
    return bool(conditions["kind"] != "no_classes" and conditions.get("classes", True))


def merge_job(job: Job, out: str | os.PathLike[str], progress: bool = False) -> None:
    """Write arr_0, uint8 [N, H, W, 3], and arr_1, int64 [N] where the model has classes.

    One image at a time is in memory. Shards that are not on this machine are fetched into the
    temporary folder, all of them. ``progress`` shows a bar. Raises as `merge_npz` does.
    """
    channels, height, width = job.identity["sample_shape"]
    with (
        contextlib.ExitStack() as stack,
        tqdm(total=job.n, unit="image", disable=not progress, leave=False) as bar,
    ):
        found: list[tuple[Path, int, int]] = [
            (stack.enter_context(job.place.fetched(job.shard_name(k))), *job.shards.span(k))
            for k in job.shards
        ]
        watched: Any = _Watched(job.format, bar.update)
        merge_npz(found, watched, (channels, height, width), out, has_labels(job))


class _Watched:
    """A format that tells of every image that is read with it."""

    def __init__(self, format: Format, tell: Callable[[int], Any]) -> None:
        self._format, self._tell = format, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._format, name)

    def entries(self, path: Path, first: int) -> Iterator[tuple[int, bytes]]:
        """Those of the format."""
        for entry in self._format.entries(path, first):
            yield entry
            self._tell(1)
