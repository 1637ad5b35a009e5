"""``stepfuse export``: what its options say, and what of it does not fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.precisions import PRECISIONS
from stepfuse.kernels.limits import check_seed

REPORTS = (".md", ".json")


@dataclass(frozen=True)
class ExportOptions:
    """The command line of ``stepfuse export``; raises ValueError for what does not fit together."""

    model: str
    out: Path
    precision: str
    batch: BatchProfile
    opset: int | None
    whole_loop: bool
    steps: str | None
    method: str | None
    spacing: str | None
    eta: float | None
    order: int | None
    solver_type: str | None
    guidance: float
    tensorrt: Path | None
    compute_capability: str | None
    timing_cache: Path | None
    check: bool
    tolerance: float | None
    report: Path | None
    seed: int

    def __post_init__(self) -> None:
        if self.out.suffix.lower() != ".onnx":
            raise ValueError(f"--out must end in .onnx; got {str(self.out)!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"--precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}"
            )
        if not math.isfinite(self.guidance):
            raise ValueError(f"--guidance must be a finite number; got {self.guidance}")
        if self.whole_loop:
            unfit = {"--tensorrt": self.tensorrt, "--tolerance": self.tolerance}
            for name, value in {**unfit, "--report": self.report}.items():
                if value is not None:
                    raise ValueError(f"{name} is for a network alone; got --whole-loop too")
        else:
            guidance = None if self.guidance == 1 else f"{self.guidance:g}"
            for option, said in (
                ("--steps", self.steps),
                ("--method", self.method),
                ("--spacing", self.spacing),
                ("--eta", None if self.eta is None else f"{self.eta:g}"),
                ("--guidance", guidance),
                ("--order", None if self.order is None else str(self.order)),
                ("--solver-type", self.solver_type),
            ):
                if said is not None:
                    raise ValueError(f"{option} {said} is part of a sampler; give --whole-loop too")
        if self.tensorrt is None:
            for name, given in (
                ("--compute-capability", self.compute_capability),
                ("--timing-cache", self.timing_cache),
            ):
                if given is not None:
                    raise ValueError(f"{name} needs --tensorrt FILE; got {str(given)!r}")
        if not self.check:
            for name, value in (("--tolerance", self.tolerance), ("--report", self.report)):
                if value is not None:
                    raise ValueError(f"{name} needs --check; got {str(value)!r}")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ValueError(f"--tolerance must be a positive number; got {self.tolerance}")
        if self.report is not None and self.report.suffix.lower() not in REPORTS:
            raise ValueError(
                f"--report must end in {' or '.join(REPORTS)}; got {str(self.report)!r}"
            )
        check_seed("--seed", self.seed)
        paths = [path.resolve() for path in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError(f"two files with one name; got {', '.join(map(str, self.files))}")

    @property
    def files(self) -> list[Path]:
        """Everything that will be written."""
        return [
            path
            for path in (self.out, self.tensorrt, self.timing_cache, self.report)
            if path is not None
        ]
