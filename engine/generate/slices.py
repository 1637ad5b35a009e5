"""Which shards are this process's own where many share a job without talking to each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# (index, count, lowest index, step) of those who number their tasks, by their variables
_NUMBERED = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN",
     "SLURM_ARRAY_TASK_STEP"),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE", "", ""),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", "", ""),
    ("RANK", "WORLD_SIZE", "", ""),
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """Shards k with k % count == index."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"--shard i/n must have 0 <= i < n; got {self.index}/{self.count}")

    def of(self, shards: Iterable[int]) -> Iterator[int]:
        """Its own."""
        return (k for k in shards if k % self.count == self.index)

    def others(self, shards: Iterable[int]) -> Iterator[int]:
        """Those of everyone else."""
        return (k for k in shards if k % self.count != self.index)


def parse(text: str, variables: Mapping[str, str] = os.environ) -> Slice:
    """The slice of "i/n"; of "auto", what the variables of a scheduler say: SLURM's arrays, AWS
    Batch's, Kubernetes' indexed jobs (with JOB_COMPLETIONS set beside their own) or torchrun.

    Raises ValueError for a text or variables that say nothing of the kind.
    """
    if text != "auto":
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None:
            raise ValueError(f"--shard must be i/n, 0/8 say, or auto; got {text!r}")
        return Slice(int(found[1]), int(found[2]))
    for index, count, lowest, step in _NUMBERED:
        if index not in variables:
            continue
        if count not in variables:
            raise ValueError(
                f"--shard auto: {index} is set, but {count}, how many there are, is not"
            )
        numbers = [variables[index], variables[count], variables.get(lowest) or "0",
                   variables.get(step) or "1"]  # fmt: skip
        if not all(number.isdecimal() for number in numbers) or numbers[3] == "0":
            raise ValueError(
                f"--shard auto: {index} and {count} must be numbers; got {numbers[:2]}"
            )
        i, n, first, by = map(int, numbers)
        return Slice((i - first) // by, n)
    names = ", ".join(f"{index} with {count}" for index, count, *_ in _NUMBERED)
    raise ValueError(f"--shard auto finds none of {names}; accepted: i/n, or one of these pairs")
