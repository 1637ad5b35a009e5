"""``stepfuse sample``: what its options say, and what of it cannot be meant."""

from __future__ import annotations

from dataclasses import dataclass

from stepfuse.kernels.limits import check_threads

OPTIMIZE = ("off", "float32", "bfloat16")


@dataclass(frozen=True)
class SampleOptions:
    """The command line of ``stepfuse sample``; raises ValueError for numbers out of range."""

    model: str
    count: int
    steps: str | None
    method: str | None
    spacing: str | None
    eta: float | None
    order: int | None
    solver_type: str | None
    grid: str | None
    guidance: float
    labels: tuple[str, ...]
    seed: int
    first_index: int
    batch_size: int | None
    backend: str
    optimize: str
    device: str
    threads: int | None
    scale: int | None
    columns: int | None

    def __post_init__(self) -> None:
        if self.optimize not in OPTIMIZE:
            raise ValueError(
                f"--optimize must be one of {', '.join(OPTIMIZE)}; got {self.optimize!r}"
            )
        for name, value, least in (
            ("-n", self.count, 1),
            ("--first-index", self.first_index, 0),
            ("--batch-size", self.batch_size, 1),
            ("--columns", self.columns, 1),
            ("--scale", self.scale, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        check_threads("--threads", self.threads)
        if self.scale is not None and self.scale > 8:
            raise ValueError(f"--scale must be in 1 .. 8; got {self.scale}")
        if not abs(self.guidance) < float("inf"):
            raise ValueError(f"--guidance must be a finite number; got {self.guidance}")

    @property
    def less_memory(self) -> str:
        """What makes the command need less."""
        at_a_time = min(self.batch_size or self.count, self.count)
        if at_a_time > 1:
            return f"fewer images at a time need less (--batch-size, now {at_a_time})"
        if self.count > 1:
            return f"fewer images need less (-n, now {self.count})"
        return "one image of this model is more than this machine holds"
