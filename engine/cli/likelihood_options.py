"""``stepfuse likelihood``: what its options say, and what of it cannot be meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stepfuse.engine.cli.sample_options import OPTIMIZE
from stepfuse.kernels.limits import check_threads

ENDINGS = (".png", ".json", ".html")
VARIANCES = ("auto", "fixed_large", "fixed_small", "learned", "learned_range")
CDFS = ("exact", "tanh")
LABELS = ("data", "none")
SPACINGS = ("leading", "trailing", "linspace", "quadratic")


@dataclass(frozen=True)
class LikelihoodOptions:
    """The command line of ``stepfuse likelihood``; raises ValueError for what it cannot mean."""

    data: Path
    model: str
    count: int
    steps: str | None
    spacing: str
    variance: str
    cdf: str
    labels: str
    seed: int
    background: str
    out: Path | None
    batch_size: int
    optimize: str
    backend: str
    device: str
    threads: int | None

    def __post_init__(self) -> None:
        for name, word, accepted in (
            ("--optimize", self.optimize, OPTIMIZE),
            ("--variance", self.variance, VARIANCES),
            ("--cdf", self.cdf, CDFS),
            ("--labels", self.labels, LABELS),
            ("--spacing", self.spacing, SPACINGS),
        ):
            if word not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {word!r}")
        for name, value in (("-n", self.count), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        check_threads("--threads", self.threads)
        if self.out is not None and (
            self.out.suffix.lower() not in ENDINGS or not self.out.stem.strip(".")
        ):
            raise ValueError(f"--out must end in {', '.join(ENDINGS)}; got {str(self.out)!r}")

    @property
    def less_memory(self) -> str:
        """What makes the command need less."""
        return f"fewer pairs at a time need less (--batch-size, now {self.batch_size})"
