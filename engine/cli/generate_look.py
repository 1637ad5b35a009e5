"""``stepfuse generate status|verify|merge|stats``: looking at a job, and taking it elsewhere."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from stepfuse.engine.cli.errors import choosing_places, interruptible
from stepfuse.engine.cli.generating import ending
from stepfuse.engine.cli.printing import wrote
from stepfuse.engine.files.images import save_npz
from stepfuse.engine.files.writing import check_file
from stepfuse.engine.generate.job import Job, open_job
from stepfuse.engine.generate.merge_job import check_merge, merge_job
from stepfuse.engine.generate.reports.text import duration, per_second, plain
from stepfuse.engine.generate.stats import check_widths, frechet, read_reference, stats
from stepfuse.engine.generate.status import Machine, Status, status
from stepfuse.engine.generate.verify import Verified, verify
from stepfuse.engine.generate.words import many, size

_SHOWN = 20  # lines about shards or images
_HOSTS = 5
_LABELS = 10

RUN = Annotated[str, typer.Argument(help="Folder or URL of a job.", show_default=False)]
RECORDS_ONLY = Annotated[
    bool,
    typer.Option(
        "--records-only", help="Trust the records of shards that were moved away; read none."
    ),
]
FORCE = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def status_command(
    run: RUN,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    records_only: RECORDS_ONLY = False,
) -> int:
    """Say how far a job is, who makes it, and what has failed; nothing is changed."""
    with interruptible("nothing was changed"):
        job = open_job(run)
        found = status(job, records_only)
    if as_json:
        print(json.dumps(found.to_json()))
        return 0
    _table(status_lines(job, found))
    return 0


def verify_command(
    run: RUN,
    count: Annotated[
        int, typer.Option("-k", help="Images that are drawn and made again, with their batches.")
    ] = 64,
    full: Annotated[bool, typer.Option("--full", help="Make all of them again.")] = False,
    records_only: RECORDS_ONLY = False,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where they are made; auto is the job's.")
    ] = "auto",
) -> int:
    """Compare every shard with its record, and some images with what is made now.

    On a machine like that of the record the bytes must be equal; on others images must agree to 60
    dB, to 35 dB with bfloat16 and JPEG. Exit status: 0 everything is right, 4 something differs, 3
    shards are missing.
    """
    with interruptible("nothing was changed"):
        job = open_job(run)
        found = verify(
            job,
            count,
            full=full,
            records_only=records_only,
            seed=seed,
            device=device,
            progress=sys.stderr.isatty(),
        )
    for difference in found.differences[:_SHOWN]:
        _say(plain(str(difference)), error=True)
    if found.found > _SHOWN:
        _say(f"and {found.found - _SHOWN:,} more", error=True)
    _summarize(job, found, records_only)
    return found.status


def merge_command(
    run: RUN,
    npz: Annotated[Path, typer.Option("--npz", help="The file to write.", show_default=False)],
    force: FORCE = False,
) -> int:
    """Write all images into one .npz as the evaluators of guided-diffusion read it.

    arr_0 is uint8 [N, H, W, 3], arr_1 int64 [N] where there are classes. One image at a time is in
    memory.
    """
    with ending(run), interruptible(f"{npz} was not written"):
        job = open_job(run)
        with choosing_places():
            check_merge(job, npz, force)
        merge_job(job, npz, progress=sys.stderr.isatty())
    wrote(npz)
    _named(npz, f"{job.n:,} images, {npz.stat().st_size / 1e6:,.1f} MB; {_rounding(job)}")
    return 0


def stats_command(
    run: RUN,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="REF.npz",
            help="With mu and sigma of the same features, as guided-diffusion's have.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write mu and sigma here.", show_default=False),
    ] = None,
    force: FORCE = False,
) -> int:
    """Mean and covariance of the features that --features made, and the Frechet distance."""
    with ending(run), interruptible("nothing was written"):
        job = open_job(run)
        if out is not None:
            if out.exists() and not force:
                raise ValueError(f"{out} is there already; accepted: another name, or --force")
            with choosing_places():
                check_file(out)
        there = None
        if reference is not None:
            with choosing_places():
                there = read_reference(reference)
        found = stats(job)
        if there is not None and reference is not None:
            check_widths(found, there[0], reference)
        if out is not None:
            save_npz(out, mu=found.mu, sigma=found.sigma)
    if out is not None:
        wrote(out)
        _named(out, "mu and sigma")
    lines = [
        ("images", f"{found.images:,}"),
        ("features", f"{len(found.mu):,} of {job.settings.features}"),
        ("pixels", _rounding(job)),
    ]
    if found.singular:
        lines.append(("note", "no more images than features: the covariance is singular"))
    if there is not None:
        distance = frechet(found.mu, found.sigma, *there)
        lines.append(("distance", f"{distance:.6g} (Frechet, squared) to {reference}"))
    _table(lines)
    return 0


def status_lines(job: Job, found: Status) -> list[tuple[str, str]]:
    """Names and values to print."""
    settings = job.settings
    lines = [
        ("job", f"{found.url}: {settings.model}, seed {settings.seed}, {job.format.name}"),
        ("rows", _conditions(found.conditions)),
        ("images", f"{found.images_done:,} of {found.images:,} ({_share(found)})"),
        ("shards", f"{found.shards_done:,} of {found.shards:,} of {job.shards.size:,} images"),
        ("size", size(found.bytes)),
    ]
    if found.images_done:
        share = found.writer_wait / found.seconds if found.seconds else 0.0
        lines.append(
            ("speed", f"{per_second(found.images_per_s)}/s of one worker, writer {share:.0%}")
        )
    if found.eta is not None:
        when = "" if found.images_done == found.images else f": {duration(found.eta)} left"
        lines.append(("at work", f"{many(found.at_work, 'worker')}{when}"))
    elif found.at_work:
        lines.append(("at work", many(found.at_work, "worker")))
    if found.moved:
        lines.append(
            ("moved", f"{found.moved:,} records have no shard, or one of another size; "
             "--records-only trusts them")
        )  # fmt: skip
    if found.abandoned:
        lines.append(
            ("leftovers", f"{found.abandoned:,} temporary names, which the next run removes")
        )
    lines += [("machine", _machine(machine, found)) for machine in found.machines[:_SHOWN]]
    if found.differing:
        lines.append(
            ("note", f"{len(found.machines):,} kinds of machines: images agree up to rounding; "
             f"they differ in {', '.join(found.differing)}")
        )  # fmt: skip
    failed = sorted(found.failed)
    lines += [("failed", f"shard {k}: {plain(found.failed[k])[:300]}") for k in failed[:_SHOWN]]
    if len(failed) > _SHOWN:
        lines.append(("failed", f"and {len(failed) - _SHOWN:,} more, see failed/"))
    if found.images_done < found.images and not found.at_work:
        lines.append(("next", f"stepfuse generate {shlex.quote(found.url)} goes on"))
    return lines


def _share(found: Status) -> str:
    """Never 100 % before everything is there."""
    return f"{int(1000 * found.images_done / found.images) / 10:g} %"


def _machine(machine: Machine, found: Status) -> str:
    most = sorted(machine.hosts.items(), key=lambda item: (-item[1], item[0]))
    hosts = [f"{host} ({count:,})" for host, count in most[:_HOSTS]]
    if len(machine.hosts) > _HOSTS:
        hosts.append(f"{len(machine.hosts) - _HOSTS:,} more")
    names = found.differing or ("processor", "isa", "threads", "torch")
    told = ", ".join(f"{name} {machine.fingerprint.get(name, 'unknown')}" for name in names)
    return f"{machine.name}: {many(machine.shards, 'shard')} by {', '.join(hosts)}; {told}"


def _conditions(settings: dict[str, Any]) -> str:
    """The words of `Conditions.settings`, of long lists only the length."""
    told = []
    for name, value in settings.items():
        if isinstance(value, list) and len(value) > _LABELS:
            value = f"{len(value):,} of them"
        elif isinstance(value, list):
            value = " ".join(map(str, value)) or "none"
        elif isinstance(value, dict):
            value = _conditions(value)
        if name == "sha256":
            value = f"{value[:12]}…"
        if value is not None:
            told.append(f"{name} {value}" if name != "kind" else str(value).replace("_", " "))
    return plain(", ".join(told))


def _summarize(job: Job, found: Verified, records_only: bool) -> None:
    what = "records" if records_only else "shards"
    parts = [f"{found.images:,} images in {found.shards:,} {what} read"]
    if found.equal:
        parts.append(f"{found.equal:,} made again, equal")
    if found.alike:
        parts.append(f"{found.alike:,} of other machines made again, {found.worst:.1f} dB or more")
    if found.unread:
        parts.append(f"{found.unread:,} of other machines not compared")
    if found.missing:
        shown = list(map(str, found.missing[:_SHOWN]))
        if len(found.missing) > _SHOWN:
            shown.append(f"and {len(found.missing) - _SHOWN:,} more")
        parts.append(f"{many(len(found.missing), 'shard')} missing: {', '.join(shown)}")
    parts.append(many(found.found, "difference") if found.found else "no difference")
    _say(f"{job.place.url}: {'; '.join(parts)}")


def _rounding(job: Job) -> str:
    rounding = job.identity["output"]["rounding"]
    if job.format.takes != "pixels":
        return "not rounded"
    if rounding == "truncate":
        return "truncated to grey levels, as guided-diffusion does"
    return "rounded to the nearest grey level; guided-diffusion truncates, half a level darker"


def _table(lines: list[tuple[str, str]]) -> None:
    for name, value in lines:
        _say(f"{name:<12}{value}")


def _named(path: Path, what: str) -> None:
    line = Text(str(path), style="bold").append(f": {what}", style="not bold")
    Console(highlight=False).print(line, soft_wrap=True)


def _say(text: str, error: bool = False) -> None:
    Console(stderr=error, highlight=False).print(Text(text), soft_wrap=True)
