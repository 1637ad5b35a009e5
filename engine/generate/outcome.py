"""How a run of a job has ended, for people and for shells."""

from __future__ import annotations

from dataclasses import dataclass, field

COMPLETE, USAGE, FAILURE, POISONED, DIFFERS, DISK, PREEMPTED, INTERRUPTED = (
    0,
    2,
    1,
    3,
    4,
    74,
    75,
    130,
)


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        status: 0 everything asked for is there; 1 it could not begin; 3 but for shards that have
            failed; 74 disk full or not to be written; 75 preempted; 130 Ctrl-C.
        made: shards of this run.
        failed: what was raised last, by the shard's number.
        reason: in words where the run ended early.
        left: shards of the job that are not done, by whomever.
    """

    status: int = COMPLETE
    made: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    reason: str = ""
    left: int = 0
