"""``stepfuse bench``: the work behind the options."""

from __future__ import annotations

import importlib
import importlib.util
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from stepfuse.bench import script
from stepfuse.bench.candidates import chosen, libraries
from stepfuse.bench.machine import describe
from stepfuse.bench.measure import Bench, Plan
from stepfuse.bench.record import Record, load
from stepfuse.bench.workload import Spec, Workload
from stepfuse.engine.cli.errors import INTERRUPTED, Problem, choosing_places, interruptible
from stepfuse.engine.cli.models import choose_device, load_model
from stepfuse.engine.cli.printing import wrote
from stepfuse.engine.files.reading import NOT_THERE, kind_of
from stepfuse.engine.files.writing import check_file, write_file
from stepfuse.kernels.limits import check_memory

NAMES = ("record.json", "report.md", "report.html")
ROOFLINE = "roofline.json"  # where --static leaves its table, and a report finds it


@dataclass(frozen=True)
class Targets:
    """Where the record, the tables and the report go."""

    json: Path
    markdown: Path
    html: Path

    @classmethod
    def of(
        cls,
        folder: Path,
        json: Path | None,
        markdown: Path | None,
        html: Path | None,
        static: bool = False,
    ) -> Targets:
        """Files of their own, or else the usual ones in ``folder``."""
        names = (ROOFLINE, "roofline.md", "roofline.html") if static else NAMES
        usual = [folder / name for name in names]
        return cls(json or usual[0], markdown or usual[1], html or usual[2])

    def check(self) -> None:
        """Make the folder; raise OSError with the reason where something cannot be written.

        A folder that was made for nothing is removed.
        """
        files = (self.json, self.markdown, self.html)
        if len({file.absolute() for file in files}) < len(files):
            raise ValueError(f"three different files are written; got {', '.join(map(str, files))}")
        made: list[Path] = []
        try:
            for file in files:
                if file.parent.parent.is_dir() and not file.parent.exists():
                    file.parent.mkdir()
                    made.append(file.parent)
                check_file(file)
        except OSError:
            for folder in made:
                folder.rmdir()
            raise

    def save(self, record: Record) -> None:
        """The record alone."""
        record.save(self.json)


def run(
    spec: dict[str, Any],
    batch: str,
    dtype: str,
    against: str,
    rounds: int,
    time_limit: float,
    processes: int,
    busy: int,
    targets: Targets,
) -> None:
    """Check everything, measure, write, and print. The arguments are those of the command."""
    plan = Plan(_batches(batch), rounds, None if time_limit == 0 else time_limit, processes, busy)
    described = Spec(**{**spec, "device": str(choose_device(spec["device"]))})
    entries = chosen(libraries(against), dtype, spec["optimize"], described.device)
    if not math.isfinite(described.eta):
        raise ValueError(f"--eta must be a finite number; got {described.eta}")
    if described.threads is not None:
        torch.set_num_threads(described.threads)
    workload = _workload(described)
    most = max(plan.batches)
    # x and the prediction in float32 are the least that a candidate holds
    check_memory(f"--batch {most}", 2 * 4 * most * math.prod(workload.shape))
    with choosing_places():
        targets.check()
    console = script.console()
    with _progress() as watch:
        work = Bench(
            workload, entries, plan, watch, targets.save, f"stepfuse {shlex.join(sys.argv[1:])}"
        )
        record = work.run()
    show(record, targets, console)
    if not record.complete:
        raise Problem(f"interrupted; what had been measured is in {targets.json}", INTERRUPTED)


def static(targets: Targets) -> None:
    """The static table of the GPU kernels: compiled, not run."""
    if importlib.util.find_spec("triton") is None:
        raise Problem("--static compiles the Triton kernels: pip install 'stepfuse[triton]'")
    with choosing_places():
        targets.check()
    from stepfuse.bench.roofline import render, static_table

    console = script.console()
    with interruptible("nothing was written"):
        with _progress() as watch:
            watch.stage("compiling the Triton kernels for four GPU architectures")
            rows = static_table()
        record = Record(
            kind="roofline",
            machine=describe(),
            command="stepfuse bench --static",
            roofline=[asdict(row) for row in rows],
        )
        # as it will be read: tuples are lists
        targets.save(record)
        wrote(targets.json)
        console.print(render(rows))
        _write_reports(load(targets.json), targets, console)


def show_comparison(a: Path, b: Path) -> None:
    """What changed from one record to the other."""
    for path in (a, b):
        if kind_of(path) == NOT_THERE:
            raise ValueError(f"--compare: there is no file {path}")
    records = [load(path) for path in (a, b)]
    compare = importlib.import_module("stepfuse.bench.compare").compare
    script.console().print(compare(*records).table())


def show(record: Record, targets: Targets, console: Console) -> None:
    """Print the tables, write tables and report, and say where they are."""
    wrote(targets.json)
    tables = _module("tables")
    if tables is not None:
        tables.print_tables(record, console)
    _write_reports(record, targets, console)


def _write_reports(record: Record, targets: Targets, console: Console) -> None:
    """Tables and report beside the record, as far as this installation can make them."""
    written = [targets.json]
    tables, report = _module("tables"), _module("report")
    if tables is not None:
        write_file(targets.markdown, tables.markdown(record).encode())
        written.append(targets.markdown)
        wrote(targets.markdown)
    if report is not None:
        reason = report.why_not()
        if reason:
            console.print(f"no HTML report: {reason}", markup=False, soft_wrap=True)
        else:
            roofline = _roofline(record, targets, console)
            write_file(targets.html, report.html(record, roofline=roofline).encode())
            written.append(targets.html)
            wrote(targets.html)
    console.print()
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _roofline(record: Record, targets: Targets, console: Console) -> list[dict[str, Any]] | None:
    """What an earlier --static left beside the record; None where there is nothing."""
    path = targets.json.parent / ROOFLINE
    if record.kind != "sampler" or not path.is_file():
        return None
    try:
        return load(path).roofline
    except ValueError as error:
        console.print(f"the report goes without the static table: {error}", soft_wrap=True)
        return None


def _module(name: str) -> Any:
    """A module of stepfuse.bench; None where this installation lacks it."""
    full = f"stepfuse.bench.{name}"
    return importlib.import_module(full) if importlib.util.find_spec(full) else None


def _workload(spec: Spec) -> Workload:
    # here: its errors speak of the file
    return Workload(spec, load_model(spec.model) if Path(spec.model).is_file() else None)


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--batch must be whole numbers like 1,8,32; got {text!r}") from None


class Bar:
    """`stepfuse.bench.measure.Watch` on a terminal; lines in a file."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("starting", total=None)

    def stage(self, text: str, total: int | None = None) -> None:
        self._progress.reset(self._task, description=text, total=total)
        if not self._progress.console.is_terminal:
            self._progress.console.print(text, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        self._progress.advance(self._task)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Bar]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield Bar(bar)
