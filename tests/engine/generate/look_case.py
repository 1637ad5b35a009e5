"""Small jobs that are complete, and ways to harm them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.generate.create import create
from stepfuse.engine.generate.job import Job, open_job
from stepfuse.engine.generate.place import open_place
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.record import Record, pack
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.work import run_shard, todo

IMAGES, BATCH, SHARD = 21, 4, 8  # three shards, the last one of five images
FEATURES = f"{__name__}:features"


def features(pixels: Tensor) -> Tensor:
    """uint8 [N, 1, 8, 8] to three numbers each."""
    x = pixels.double() / 255
    return torch.stack((x.mean((1, 2, 3)), x[:, 0, 0].mean(1), x[:, 0, :, 3].square().mean(1)), 1)


def new_job(folder: Path, model: str, n: int = IMAGES, **options: Any) -> Job:
    """A job of which nothing is made, with nothing left for a trial."""
    given = {
        "recipe": Recipe(steps="2"),
        "batch_size": BATCH,
        "shard_size": SHARD,
        "threads": 1,
        "format": "webdataset",
        "device": "cpu",
        **options,
    }
    return create(Settings(model=model, **given), n, open_place(folder)).job


def made_job(folder: Path, model: str, n: int = IMAGES, **options: Any) -> Job:
    """The same, complete."""
    job = new_job(folder, model, n, **options)
    for k in todo(job):
        run_shard(job, k)
    return open_job(folder)


def shard_path(job: Job, k: int) -> Path:
    """The file or folder of a shard."""
    return Path(job.place.url, job.shard_name(k))


def changed_record(job: Job, k: int, **fields: Any) -> Record:
    """Write the record of shard k anew, with other values."""
    record = job.record(k)
    assert record is not None
    record = replace(record, **fields)
    job.place.write(job.record_name(k), record.to_json())
    return record


def flipped(path: Path, offset: int) -> None:
    """One byte of a file becomes another one."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def many_records(job: Job) -> None:
    """A record and a shard of nothing for every shard of a job, quicker than by the job itself."""
    folder = Path(job.place.url)
    for name in ("records", "shards"):
        (folder / name).mkdir(exist_ok=True)
    fingerprint = {"isa": "avx512", "aten": "AVX512", "torch": "2.13", "processor": "one"}
    size = job.shards.size
    record = Record(0, 0, size, 0, "0" * 64, fingerprint, "here", 2.0, 0.5, 1, _sums(size))
    fields = json.loads(record.to_json())
    for k in job.shards:
        fields["shard"], (fields["first"], fields["count"]) = k, job.shards.span(k)
        fields["crc32"] = record.crc32 if fields["count"] == size else _sums(fields["count"])
        (folder / job.record_name(k)).write_text(json.dumps(fields))
        (folder / job.shard_name(k)).touch()


def _sums(count: int) -> str:

    return pack(range(count))
