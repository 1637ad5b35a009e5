"""Making a job, or finding that it is there already."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepfuse.engine.compile.timings import Timings
from stepfuse.engine.generate import claims
from stepfuse.engine.generate import identity as identities
from stepfuse.engine.generate.claims import Claim
from stepfuse.engine.generate.conditions.choosing import choose as choose_conditions
from stepfuse.engine.generate.conditions.row import Conditions
from stepfuse.engine.generate.crew import choose_crew, resolve_device
from stepfuse.engine.generate.engines.start import Child, paths
from stepfuse.engine.generate.features import load_features
from stepfuse.engine.generate.formats.pictures import Pictures
from stepfuse.engine.generate.job import INDEX, PLAN, Job, OtherJob, exists, open_job
from stepfuse.engine.generate.machine import fingerprint
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.order import Order
from stepfuse.engine.generate.place import LocalPlace, Place
from stepfuse.engine.generate.settings import Settings, check_count
from stepfuse.engine.generate.source import Source, open_source
from stepfuse.engine.generate.trial import THOROUGH, Depth, Found, Tried
from stepfuse.engine.generate.words import size
from stepfuse.kernels.backends import resolve

MANY = 10_000  # images, from which single files are too many
_SHARD_SECONDS, _SHARD_BYTES = 180.0, 200e6
_SHARDS_PER_WORKER = 4  # at least, so that nobody waits long for the last one


class TrialFailed(RuntimeError):
    """The network could not be run once."""


@dataclass(frozen=True)
class Created:
    """A job and what was found out on the way.

    Attributes:
        job: in its place.
        found: by the trial; None where nothing was left to be chosen, or the job was there.
        new: whether it was made now.
    """

    job: Job
    found: Found | None
    new: bool


def create(
    settings: Settings,
    n: int,
    place: Place,
    *,
    workers: int | None = None,
    memory: int | None = None,
    force: bool = False,
    tell: Callable[[Tried], Any] = lambda tried: None,
) -> Created:
    """The job with these settings: a new one, or that which is in its place.

    What the settings leave open, a trial chooses; a job that is there has chosen. Its number of
    images is raised where ``n`` is more.

    Args:
        workers: that it will have, as far as is known.
        memory: bytes that one worker may take.
        force: begin although the disk seems too small.
        tell: hears of every batch size that was tried.

    Everything that can be is checked before a network is loaded: raises ValueError for settings
    that cannot be meant, `OtherJob` for a place that holds another job, OSError for one that
    cannot be written to, and `TrialFailed` where the network does not run.
    """
    check_count(n)
    place.check()
    with prepared(settings, n) as ready:
        if exists(place):
            return Created(_found(place, settings, ready.identity, n), None, False)
        with _alone(place):
            if exists(place):  # another one was quicker
                return Created(_found(place, settings, ready.identity, n), None, False)
            found = None
            if ready.nothing_open:
                check_disk(place, ready.known_bytes_per_image * n, force)
            else:
                found = try_out(ready, n, memory, tell)
                check_disk(place, found.bytes_per_image * n, force)
            job = _write(place, ready, n, found, workers)
    return Created(job, found, True)


@dataclass(frozen=True)
class Ready:
    """Settings that have been checked, and what was found out from files on the way.

    Attributes:
        settings: with a format, and paths that hold wherever a worker is started.
        device: of the workers.
        identity: as far as it does not wait for a trial.
        index: of the file of conditions.
    """

    settings: Settings
    device: str
    identity: dict[str, Any]
    index: bytes | None

    @property
    def nothing_open(self) -> bool:
        """Whether a trial could choose nothing."""
        chosen = (self.settings.batch_size, self.settings.shard_size, self.settings.threads)
        return None not in chosen and self.settings.recipe.optimize == "off"

    @property
    def known_bytes_per_image(self) -> int:
        """As it is written, without making one; 0 for pictures, which a trial or a shard shows."""
        format, (channels, *sizes) = self.settings.output(), self.identity["sample_shape"]
        if isinstance(format, Pictures):
            return 0
        of_pixels = format.takes == "pixels"
        shape = (*sizes, channels) if of_pixels else (channels, *sizes)
        blank = np.zeros(shape, np.uint8 if of_pixels else np.float32)
        return len(format.encode(Made(0, blank)))


@contextlib.contextmanager
def prepared(settings: Settings, n: int) -> Iterator[Ready]:
    """Check the settings of a job of ``n`` images against their files; no network is loaded."""
    check_count(n)
    with _given("--model", settings.model):
        source = open_source(settings.model)
    device = resolve_device(settings.device)
    settings = _settled(settings, source, n)
    identity = asked(settings, source, device)
    with _rows_of(settings, source) as (conditions, index):
        conditions.check(n)
        identity["conditions"] = conditions.settings()
        yield Ready(settings, device, identity, index)


def _write(place: Place, ready: Ready, n: int, found: Found | None, workers: int | None) -> Job:
    settings = chosen(ready, n, found, workers)
    plan = (found.timings if found else Timings().to_json()).encode()
    identity = {
        **ready.identity,
        "batch_size": settings.batch_size,
        "shard_size": settings.shard_size,
        "threads": settings.threads,
        "plan": hashlib.sha256(plan).hexdigest(),
    }
    if ready.index is not None:
        place.write(INDEX, ready.index)
    place.write(PLAN, plan)
    libraries = settings.output().libraries()
    made_with = fingerprint(torch.device(ready.device), settings.threads or 1, libraries)
    job = Job(place, settings, identity, n, made_with)
    job.save()  # the last: a place with this file has all that it needs
    return job


def asked(settings: Settings, source: Source, device: str) -> dict[str, Any]:
    """The part of the identity that does not wait for a trial or a file of conditions."""
    recipe = settings.recipe
    table = recipe.table_hash(source)
    if recipe.guidance != 1 and source.num_classes is None:
        raise ValueError(
            f"--guidance {recipe.guidance:g} needs labels to be guided by, but the model has no "
            "classes"
        )
    format = settings.output()
    format.check()
    if format.takes == "pixels" and source.sample_shape[0] not in (1, 3):
        raise ValueError(
            f"--format {format.name} holds images of 1 or 3 channels, and model "
            f"{settings.model!r} makes {source.sample_shape[0]}; accepted: --format npy"
        )
    if settings.features is not None:
        load_features(settings.features)
    backend = resolve(recipe.backend, torch.device(device), torch.float32)
    return {
        "format": identities.FORMAT,
        "weights": source.sha256,
        "sample_shape": list(source.sample_shape),
        "sampling": {
            "method": recipe.method,
            "steps": recipe.steps,
            "spacing": recipe.spacing,
            "eta": recipe.eta,
            **recipe.solver(),
            "guidance": recipe.guidance,
            "optimize": recipe.optimize,
            "backend": backend,
            "prediction_type": source.prediction_type,
            "table": table,
        },
        "seed": settings.seed,
        "device": device.partition(":")[0],
        "output": {**format.settings(), "rounding": settings.rounding},
        "features": settings.features,
    }


def check_disk(place: Place, needed: float, force: bool) -> None:
    """Raise OSError where ``needed`` bytes will not fit into the place."""
    free = place.free()
    if free is not None and needed > free and not force:
        raise OSError(
            errno.ENOSPC,
            f"about {size(needed)} are to be written and {size(free)} are free; "
            "accepted: fewer images (-n), another place (--out), or --force",
            place.url,
        )


def _settled(settings: Settings, source: Source, n: int) -> Settings:
    """With a recipe, a format, and paths that hold wherever a worker is started."""
    conditions = settings.conditions
    if conditions is not None:
        conditions = str(Path(conditions).absolute())
    model = settings.model
    if Path(model).is_file():
        model = str(Path(model).absolute())
    format = settings.format
    if format is None:
        format = "webdataset" if n > MANY else settings.image
    recipe = settings.recipe.settled(source)
    return replace(settings, recipe=recipe, conditions=conditions, model=model, format=format)


def _found(place: Place, given: Settings, identity: dict[str, Any], n: int) -> Job:
    """The job that is there; raises `OtherJob` that names the settings that differ.

    What was not given may be as it likes.
    """
    job = open_job(place)
    wanted = dict(identity)
    if given.format is None:
        wanted["output"] = {"rounding": given.rounding}
    for name in ("batch_size", "shard_size", "threads"):
        if getattr(given, name) is not None:
            wanted[name] = getattr(given, name)
    differing = identities.differences(job.identity, wanted)
    if differing:
        raise OtherJob(
            f"{place.url} holds another job: {'; '.join(differing)}. Accepted: the same settings, "
            f"another folder, or `stepfuse generate {place.url}` to go on with that one"
        )
    return raise_count(job, n)


def raise_count(job: Job, n: int | None) -> Job:
    """The job with ``n`` images, saved; ValueError for fewer, or too few rows for them."""
    if n is None or n == job.n:
        return job
    raised = job.raised(n)
    raised.conditions.check(n)
    raised.save()
    return raised


@contextlib.contextmanager
def _rows_of(settings: Settings, source: Source) -> Iterator[tuple[Conditions, bytes | None]]:
    """The conditions that are asked for; of a file, with the content of its index."""
    with tempfile.TemporaryDirectory(prefix="stepfuse-") as folder:
        index = Path(folder, INDEX) if settings.conditions else None
        with _given("--conditions", settings.conditions):
            conditions = choose_conditions(
                source.labels,
                labels=settings.label or (None if settings.labels == "turn" else settings.labels),
                seed=settings.seed,
                per_class=settings.per_class,
                path=settings.conditions,
                index_path=index,
                per_row=settings.per_row,
            )
        yield conditions, index.read_bytes() if index else None


@contextlib.contextmanager
def _given(option: str, value: str | None) -> Iterator[None]:
    """What cannot be read inside was given by this option, and is no fault of the place."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{option} {value}: {error.strerror or error}") from error


@contextlib.contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Of several processes that make a job in one folder, one at a time."""
    if not isinstance(place, LocalPlace):
        yield
        return
    new = not place.folder.exists()
    try:
        with Claim(place, "job").waiting():
            yield
    finally:
        claims.clean(place)
        if new:
            with contextlib.suppress(OSError):  # there is a job in it
                place.folder.rmdir()


def try_out(
    ready: Ready,
    n: int,
    memory: int | None,
    tell: Callable[[Tried], Any] = lambda tried: None,
    depth: Depth = THOROUGH,
) -> Found:
    """A trial in a process of its own, which runs as a worker would."""
    settings, device = ready.settings, ready.device
    threads = settings.threads or 1
    berth = choose_crew(device, threads, 1)[0]
    arguments = {"settings": settings.to_json(), "n": n, "memory": memory, "depth": depth}
    order = Order("trial", paths(), berth.cpus, threads, berth.device, arguments)
    child = Child(order, berth.environment)
    try:
        while True:
            message = child.heard()
            if message is None:
                raise TrialFailed(f"the trial of model {settings.model!r}: {child.death()}")
            what, *rest = message
            if what == "tried":
                tell(rest[0])
            elif what == "found":
                found: Found = rest[0]
                return found
            else:
                kind, text, _ = rest
                if kind == "given":
                    raise ValueError(text)
                raise TrialFailed(f"the trial of model {settings.model!r}: {text}")
    finally:
        child.drop()
        child.end()


def chosen(ready: Ready, n: int, found: Found | None, workers: int | None) -> Settings:
    """The settings with batch size, shard size and threads."""
    settings = ready.settings
    if found is None:
        return settings
    batch, threads = found.batch_size, settings.threads or 1
    size = settings.shard_size
    if size is None:
        crew = workers or len(choose_crew(ready.device, threads, peak_bytes=found.peak_bytes))
        most = min(
            _SHARD_SECONDS * found.images_per_s,
            _SHARD_BYTES / found.bytes_per_image,
            math.ceil(n / (_SHARDS_PER_WORKER * crew)),
        )
        size = max(1, math.ceil(most / batch)) * batch
    return replace(settings, batch_size=batch, shard_size=size, threads=threads)
