"""Jobs of `generate`, whose images are not made here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.api import world
from tests.api.case import Call
from tests.engine.generate import case, models

import stepfuse as sf
from stepfuse.engine.generate import api
from stepfuse.engine.generate.outcome import Outcome
from stepfuse.engine.generate.reports.several import Silent

FRESH = "a folder that is made for every call"
_numbers = itertools.count()
# PyTorch's sentences about a device, a folder's or a file's absence
PATH = ("holds no job", "No such file", "is a folder", "is not a folder")


def target() -> Path:
    """A path where nothing is."""
    return Path(world.folder.name) / f"job{next(_numbers)}"


def generate(**arguments: Any) -> Outcome:
    """`sf.generate` up to where shards would be made; in a new place unless one is asked for."""
    if isinstance(arguments.get("out"), str) and arguments["out"] == FRESH:
        arguments["out"] = str(there()) if arguments.get("n", 0) is None else target()
    with mock.patch.object(api, "make", return_value=Outcome()):
        return sf.generate(**arguments)


def there() -> Path:
    """The folder of a job."""
    folder = target()
    case.new_job(folder)
    return folder


def generating() -> Call:
    options = (
        "per_class", "per_row", "batch_size", "shard_size", "allow_other_isa", "records_only",
        "solver_type",
    )  # fmt: skip
    dashed = {name: (f"--{name.replace('_', '-')}",) for name in options}
    table = target().with_suffix(".csv")
    table.write_text("label\n" + "0\n" * 8)
    return Call(
        generate,
        {
            "model": f"{case.MODELS}:plain", "n": 8, "out": FRESH, "seed": 3, "method": "ddim",
            "steps": 2, "eta": 0.5, "guidance": 2.0, "labels": "turn", "format": "webdataset",
            "batch_size": 4, "shard_size": 8, "threads": 1, "device": "cpu",
        },
        {
            "out": {"a text"}, "seed": {"-1", "0"}, "eta": {"0"}, "level": {"0"},
            "guidance": {"-1", "0", "1.5", "2 ** 70"}, "label": {"an empty list", "as an iterator"},
            "grace": {"0", "1.5", "2 ** 70"},
        },
        named={
            **dashed, "n": ("-n",), "model": ("unknown checkpoint",), "out": PATH,
            "address": ("--address",), "conditions": ("--conditions",), "level": ("level",),
        },
        beside={
            "per_row": {"conditions": str(table)}, "quality": {"image": "jpeg"},
            "address": {"engine": "ray"}, "steal": {"shard": "0/2"},
            "label": {"labels": "turn"},
        },
        instead={
            "per_class": 2, "per_row": 2, "conditions": str(table), "image": "webp", "quality": 50,
            "level": 3, "workers": 2, "address": "auto", "shard": "0/2", "memory": 10**9,
            "label": ["circle"], "grace": 1.0, "watcher": Silent(), "tell": models.plain,
        },
        raises=(),
    )  # fmt: skip


def opening() -> Call:
    return Call(sf.open_job, {"where": str(there())}, named={"where": PATH})


def listing() -> Call:
    return Call(sf.todo, {"job": sf.open_job(there())})


def making() -> Call:
    job = sf.open_job(there())
    return Call(
        sf.run_shard,
        {"job": job, "k": 1},
        {"k": {"0"}, "attempt": {"2 ** 70"}, "encoders": {"0"}},
        instead={"attempt": 2, "device": "cpu", "made": print, "encoders": 1},
        raises=(IndexError,),
    )


CALLS: dict[str, Callable[[], Call]] = {
    "generate": generating,
    "open_job": opening,
    "run_shard": making,
    "todo": listing,
}
