"""`stepfuse.generate`: the command, as a function."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from stepfuse.engine.files.images import Rounding
from stepfuse.engine.generate.create import create, raise_count
from stepfuse.engine.generate.job import Job, open_job
from stepfuse.engine.generate.outcome import Outcome
from stepfuse.engine.generate.place import open_place
from stepfuse.engine.generate.recipe import Optimize, Recipe
from stepfuse.engine.generate.reports.several import Silent
from stepfuse.engine.generate.run import How, check_shared, reached, run
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.slices import parse
from stepfuse.engine.generate.stopping import Stop
from stepfuse.engine.generate.trial import Tried
from stepfuse.engine.generate.watching import Watcher
from stepfuse.kernels.arguments import check_callable, check_kind, check_path, check_text
from stepfuse.kernels.checks import as_integer, check_flag


def generate(
    model: str = "digits",
    n: int | None = None,
    out: str | os.PathLike[str] = "run",
    *,
    seed: int = 0,
    method: str | None = None,
    steps: int | str | None = None,
    spacing: str | None = None,
    eta: float | None = None,
    order: int | None = None,
    solver_type: str | None = None,
    grid: str | None = None,
    guidance: float = 1.0,
    optimize: Optimize = "off",
    backend: str = "auto",
    device: str = "auto",
    labels: str = "turn",
    label: Sequence[str] = (),
    per_class: int | None = None,
    conditions: str | os.PathLike[str] | None = None,
    per_row: int | None = None,
    format: str | None = None,
    image: str = "png",
    quality: int = 95,
    level: int | None = None,
    rounding: Rounding = "nearest",
    features: str | None = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    threads: int | None = None,
    workers: int | None = None,
    engine: str = "processes",
    address: str | None = None,
    shard: str | None = None,
    steal: bool = False,
    grace: float = 30.0,
    memory: int | None = None,
    records_only: bool = False,
    force: bool = False,
    allow_other_isa: bool = False,
    watcher: Watcher | None = None,
    tell: Callable[[Tried], Any] = lambda tried: None,
) -> Outcome:
    """Make images 0 .. n-1 of a seed into a folder; go on where an earlier call was stopped.

    Image k depends on the weights, the settings, the seed, k and row k of the conditions alone,
    and its bytes do not depend on who makes it: the batch size belongs to the job, and so do the
    compiler's choices. Work is done by processes that this function starts and ends.

        sf.generate("digits", 50_000, "run/", seed=0)
        sf.generate(out="run/")                         # resumes, with all its settings

    Args:
        model: embedded checkpoint, .safetensors file or "module:function", see `open_source`.
        n: how many; None goes on with the job that is there. It may be raised, never lowered.
        out: a folder, or a URL that fsspec knows.
        method, steps, spacing, eta: see `Sampler`; None for what is usual for the model.
        order, solver_type, grid, guidance, optimize, backend: see `Sampler`; sigmas of one's own
            are a text, "80,10,1".
        labels, label, per_class, conditions, per_row: see docs/generate.md.
        format, image, quality, level, rounding: of what is written.
        features: "module:function", for `stats`.
        batch_size, shard_size, threads: chosen by a short trial where they are None.
        workers: processes, or actors; as many as there are cores, groups of them or GPUs.
        engine: "processes", or "ray" with the ``address`` of a cluster.
        shard: "i/n" makes only every n-th shard; "auto" asks the variables of the scheduler.
        steal: then the shards of others that nobody is at.
        grace: seconds for the shards at hand once SIGTERM has come.
        memory: bytes that one worker may take.
        records_only: trust the records of shards that were moved away.
        force: begin although the disk seems too small.
        allow_other_isa: go on where instruction set or versions are not the job's.
        watcher: is told of everything; see `Watcher`.
        tell: hears of every batch size that the trial has tried.

    Raises ValueError or TypeError for settings that cannot be meant or are those of another job,
    OSError where nothing can be written. What happens while shards are made raises nothing: the
    `Outcome` tells.
    """
    check_flag("steal", steal)
    check_callable("tell", tell, "a function of a Tried")
    if watcher is not None:
        check_kind("watcher", watcher, Watcher, "a Watcher, with begin, made, shard and the others")
    if memory is not None and not 1 <= as_integer("memory", memory) < 1 << 62:
        raise ValueError(f"memory must be a number of bytes; got {memory}")
    how = How(
        engine=engine,
        workers=workers,
        slice=None if shard is None else parse(as_text("shard", shard)),
        steal=steal,
        grace=grace,
        records_only=records_only,
        force=force,
        allow_other_isa=allow_other_isa,
        address=address,
        device=device,
    )
    place = open_place(check_path("out", out))
    check_shared(place)
    if n is None:
        with reached(how):
            return make(open_job(place), how, watcher)
    settings = Settings(
        model=model,
        recipe=Recipe(
            method=method,
            steps=steps
            if steps is None or isinstance(steps, str)
            else str(as_integer("steps", steps)),
            spacing=spacing,
            eta=eta,
            guidance=guidance,
            optimize=optimize,
            backend=backend,
            order=order,
            solver_type=solver_type,
            grid=grid,
        ),
        seed=seed,
        labels=labels,
        label=label,  # type: ignore[arg-type]
        per_class=per_class,
        conditions=None if conditions is None else check_path("conditions", conditions),
        per_row=per_row,
        format=format,
        image=image,
        quality=quality,
        level=level,
        rounding=rounding,
        features=features,
        batch_size=batch_size,
        shard_size=shard_size,
        threads=threads,
        device=device,
    )
    with reached(how):
        job = create(
            settings,
            as_integer("n", n),
            place,
            workers=workers,
            memory=memory,
            force=force,
            tell=tell,
        ).job
        return make(job, how, watcher)


def as_text(name: str, value: Any) -> str:
    """``value``, which must be a string."""
    check_text(name, value)
    text: str = value
    return text


def make(job: Job, how: How, watcher: Watcher | None = None, n: int | None = None) -> Outcome:
    """`run` a job that is there, under signals that let it end in order."""
    job = raise_count(job, n)
    with Stop().listening() as stop:
        return run(job, how, watcher or Silent(), stop)
