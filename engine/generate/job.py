"""A job: what is made, where, and what of it is done."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepfuse.engine.compile.timings import Timings
from stepfuse.engine.generate import identity as identities
from stepfuse.engine.generate import record as records
from stepfuse.engine.generate import shards
from stepfuse.engine.generate.conditions.choosing import from_settings
from stepfuse.engine.generate.conditions.row import Conditions
from stepfuse.engine.generate.formats import Format
from stepfuse.engine.generate.formats import from_settings as format_of
from stepfuse.engine.generate.place import (
    A_FOLDER,
    LocalPlace,
    Place,
    RemotePlace,
    open_place,
)
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.settings import Settings, check_count
from stepfuse.engine.generate.source import Source, open_source
from stepfuse.kernels.arguments import check_path

FILE, PLAN, MANIFEST, INDEX = "job.json", "plan.json", "manifest.json", "conditions.idx"
SHARDS = "shards"


class OtherJob(ValueError):
    """The folder holds a job whose images would be others."""


class WeightsDiffer(ValueError):
    """The model is not the one that the job was made with."""


@dataclass(frozen=True)
class Job:
    """A job in its place; made by ``create`` and `open_job`.

    Attributes:
        place: where its files are.
        settings: with nothing left to be chosen.
        identity: what its images depend on, see ``identity``.
        n: images that are wanted. It may be raised.
        made_with: versions that the job was made with.
    """

    place: Place
    settings: Settings
    identity: dict[str, Any]
    n: int
    made_with: dict[str, str]

    @property
    def sha256(self) -> str:
        """Of the identity."""
        return identities.digest(self.identity)

    @property
    def shards(self) -> shards.Shards:
        """Which images are in which shard."""
        assert self.settings.shard_size is not None
        return shards.Shards(self.n, self.settings.shard_size)

    @functools.cached_property
    def format(self) -> Format:
        """Of the shards."""
        output = dict(self.identity["output"])
        output.pop("rounding")
        return format_of(output)

    @functools.cached_property
    def source(self) -> Source:
        """The network, not loaded; raises `WeightsDiffer` where it is another one by now."""
        source = open_source(self.settings.model)
        if source.sha256 != self.identity["weights"]:
            raise WeightsDiffer(
                f"model {self.settings.model!r} has weights {source.sha256[:12]}…; the job in "
                f"{self.place.url} was made with {self.identity['weights'][:12]}…"
            )
        return source

    @functools.cached_property
    def timings(self) -> Timings:
        """What decides how the network is compiled."""
        with self._needing(PLAN):
            content = self.place.read(PLAN)
        if hashlib.sha256(content).hexdigest() != self.identity["plan"]:
            raise ValueError(f"{self.place.url}/{PLAN} is not the one that the job was made with")
        return Timings.from_json(content.decode())

    @functools.cached_property
    def conditions(self) -> Conditions:
        """A row for every image."""
        with self._needing(self.settings.conditions or INDEX), self._index() as index:
            return from_settings(self.identity["conditions"], self.settings.conditions, index)

    def check(self) -> None:
        """Raise ValueError where the model or the file of conditions is gone, or is another one."""
        _ = self.source  # which is compared when it is opened
        with self._needing(self.settings.conditions or INDEX):
            self.conditions.rows(0, 1)

    def shard_name(self, k: int) -> str:
        """The file or folder of shard k: shards/000123.tar."""
        return f"{SHARDS}/{shards.name(k)}{self.format.ending}"

    def record_name(self, k: int) -> str:
        """records/000123.json."""
        return f"{records.FOLDER}/{shards.name(k)}.json"

    def failed_name(self, k: int) -> str:
        """failed/000123.json."""
        return f"{records.FAILED}/{shards.name(k)}.json"

    def record(self, k: int) -> Record | None:
        """Of shard k; None where there is none, or one that is damaged or of fewer images."""
        try:
            content = self.place.read(self.record_name(k))
        except FileNotFoundError:
            return None
        return self._fitting(k, content)

    def records(self) -> Iterator[Record]:
        """All of them that fit the job, in order; one is in memory at a time."""
        count = len(self.shards)
        for name in sorted(self.place.sizes(records.FOLDER)):
            k = shards.number(name)
            if k is not None and name.endswith(".json") and k < count:
                record = self.record(k)
                if record is not None:
                    yield record

    def done(self, records_only: bool = False) -> bytearray:
        """One byte per shard, 1 where record and shard are in place.

        A shard of another size than its record says is not; with ``records_only`` nobody looks,
        for shards that have been moved away.
        """
        found = bytearray(len(self.shards))
        sizes = {} if records_only else self.place.sizes(SHARDS)
        for record in self.records():
            name = shards.name(record.shard) + self.format.ending
            there = sizes.get(name)
            found[record.shard] = records_only or there in (record.bytes, A_FOLDER)
        return found

    def is_done(self, k: int) -> Record | None:
        """The record of shard k if both are in place."""
        record = self.record(k)
        if record is None:
            return None
        there = self.place.size(self.shard_name(k))
        return record if there in (record.bytes, A_FOLDER) else None

    def failures(self) -> dict[int, dict[str, Any]]:
        """What went wrong with the shards that have failed and are not done, by their numbers."""
        found = {}
        for name in sorted(self.place.sizes(records.FAILED)):
            k = shards.number(name)
            if k is not None and k < len(self.shards):
                found[k] = json.loads(self.place.read(f"{records.FAILED}/{name}"))
        return found

    def raised(self, n: int) -> Job:
        """The same job with more images; ValueError for fewer than it has."""
        check_count(n)
        if n < self.n:
            raise ValueError(
                f"-n cannot be lowered: the job in {self.place.url} has {self.n} images; got {n}"
            )
        return replace(self, n=n)

    def save(self) -> None:
        """Write job.json."""
        content = {
            "sha256": self.sha256,
            "n": self.n,
            "identity": self.identity,
            "settings": self.settings.to_json(),
            "made_with": self.made_with,
        }
        self.place.write(FILE, (json.dumps(content, indent=1) + "\n").encode())

    def _fitting(self, k: int, content: bytes) -> Record | None:
        try:
            record = Record.from_json(content)
        except ValueError:
            return None
        first, count = self.shards.span(k)
        return record if (record.shard, record.first, record.count) == (k, first, count) else None

    @contextlib.contextmanager
    def _needing(self, name: str) -> Iterator[None]:
        """A file that the job was made with and that is gone is no fault of the place."""
        try:
            yield
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename or name} is not there, and the job in {self.place.url} was made "
                "with it; accepted: the same file in its old place"
            ) from error

    def _index(self) -> contextlib.AbstractContextManager[Path | None]:
        if self.settings.conditions is None:
            return contextlib.nullcontext(None)
        return self.place.fetched(INDEX)


def _place(where: Any) -> Place:
    return open_place(check_path("where", where))


def exists(place: Place) -> bool:
    """Whether there is a job in it."""
    try:
        place.read(FILE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_job(where: str | os.PathLike[str] | Place) -> Job:
    """The job in a folder or at a URL.

    Raises ValueError where there is none, or one that is damaged or of a later version.
    """
    place = where if isinstance(where, (LocalPlace, RemotePlace)) else _place(where)
    try:
        text = place.read(FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{place.url} holds no job (no {FILE}); accepted: a folder that "
            "`stepfuse generate --out` has made"
        ) from None
    try:
        content = json.loads(text)
        identity = content["identity"]
        if identity["format"] != identities.FORMAT:
            raise ValueError(f"format {identity['format']!r}; accepted: {identities.FORMAT}")
        if content["sha256"] != identities.digest(identity):
            raise ValueError("its identity was changed by hand")
        settings = Settings.from_json(content["settings"])
        differing = identities.differences(identity, identities.of_settings(settings))
        if differing:
            names = ", ".join(text.partition(":")[0] for text in differing)
            raise ValueError(f"its settings were changed by hand: {names}")
        check_count(content["n"])
        return Job(place, settings, identity, content["n"], content["made_with"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place.url}/{FILE} is damaged: {error}") from None
