"""Conditions from what a user asks for, and from what a job has written down of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepfuse.engine.generate.conditions.labels import choose_labels, labels_from
from stepfuse.engine.generate.conditions.row import Conditions
from stepfuse.engine.generate.conditions.table import (
    Progress,
    Table,
    check_per_row,
    index,
    open_table,
)
from stepfuse.engine.generate.conditions.values import LABEL
from stepfuse.kernels.arguments import PathLike


def choose(
    names: Sequence[str],
    *,
    labels: str | Sequence[str] | None = None,
    seed: int = 0,
    per_class: int | None = None,
    path: PathLike | None = None,
    index_path: PathLike | None = None,
    per_row: int | None = None,
    progress: Progress | None = None,
) -> Conditions:
    """The conditions of a new job.

    Args:
        names: of the model's classes; empty for a model without.
        labels, seed, per_class: see `choose_labels`. With a file they are for one without labels.
        path: the file of conditions; None for labels alone.
        index_path: where its index is written.
        per_row: how many images each row of the file is for; one where it is None.
        progress: see `index`.

    Raises ValueError for settings that do not fit together, and as `choose_labels` and `index` do.
    """
    if path is None:
        if per_row is not None:
            raise ValueError(f"--per-row {per_row} needs --conditions, whose rows are repeated")
        return choose_labels(labels, names, seed, per_class)
    if index_path is None:
        raise ValueError("index_path must say where the index of the conditions is written")
    each = check_per_row(1 if per_row is None else per_row)
    otherwise = choose_labels(labels, names, seed, per_class)
    asked = bool(labels) or per_class is not None
    found = index(path, names, index_path, unlabelled=asked, progress=progress)
    return open_table(
        path,
        index_path,
        names,
        per_row=each,
        otherwise=None if LABEL in found.facts.columns else otherwise,
    )


def from_settings(
    settings: Mapping[str, Any],
    path: PathLike | None = None,
    index_path: PathLike | None = None,
    *,
    progress: Progress | None = None,
) -> Conditions:
    """The conditions with these `Conditions.settings`.

    Args:
        settings: of a job.
        path, index_path: of the file of conditions and its index, where there is one.
        progress: as `open_table` takes it.

    Raises ValueError where the file or its index are of another content, or not given, and for an
    unknown kind of conditions.
    """
    if settings.get("kind") != "file":
        return labels_from(settings)
    if path is None or index_path is None:
        raise ValueError("conditions from a file need path and index_path; got None")
    otherwise = settings["otherwise"]
    table = open_table(
        path,
        index_path,
        settings["classes"],
        per_row=settings["per_row"],
        otherwise=None if otherwise is None else labels_from(otherwise),
        progress=progress,
    )
    _check_same(table, settings, index_path)
    return table


def _check_same(table: Table, settings: Mapping[str, Any], index_path: PathLike) -> None:
    there = table.settings()
    differing = [name for name in there if there[name] != settings.get(name)]
    if differing:
        told = ", ".join(f"{name} is {there[name]!r:.100}" for name in differing)
        raise ValueError(
            f"{table.path} and its index {index_path} are not those of the job: {told}; accepted: "
            + ", ".join(f"{settings.get(name)!r:.100}" for name in differing)
        )
