"""A job in a process that makes its shards for another one, which it answers in tuples.

Answers are ("ready",), ("broken", kind, text, trace), ("done", k, record) and
("failed", k, kind, text, trace), with what `failures` says of an error.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch

from stepfuse.engine.generate.failures import describe, kind
from stepfuse.engine.generate.job import Job, open_job
from stepfuse.engine.generate.work import run_shard, worker_of

Answer = tuple[Any, ...]


class Maker:
    """Makes shards of the job in a place; `load` comes first.

    Args:
        url: of the job's place.
        device: where the network runs.
        allow_other_isa: see `run_shard`.
    """

    def __init__(self, url: str, device: str, allow_other_isa: bool = False) -> None:
        self.url, self.device, self.allow_other_isa = url, device, allow_other_isa
        self._job: Job | None = None

    def load(self) -> Answer:
        """Open the job and load its network: "ready", or "broken"."""
        try:
            job = open_job(self.url)
            worker_of(job, torch.device(self.device), self.allow_other_isa)
            job.conditions.rows(0, 1)
        except Exception as error:
            return ("broken", kind(error), describe(error), traceback.format_exc())
        self._job = job
        return ("ready",)

    def make(self, k: int, attempt: int, made: Callable[[int], Any]) -> Answer:
        """Make shard k: "done", or "failed". ``made`` hears of images as they are finished."""
        assert self._job is not None
        try:
            record = run_shard(
                self._job,
                k,
                attempt=attempt,
                device=self.device,
                allow_other_isa=self.allow_other_isa,
                made=made,
            )
        except Exception as error:
            return ("failed", k, kind(error), describe(error), traceback.format_exc())
        return ("done", k, record)
