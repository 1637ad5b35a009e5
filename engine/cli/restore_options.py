"""``stepfuse restore``: what its options say, and what of it cannot be meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stepfuse.kernels.limits import check_threads

TASKS = ("inpaint", "outpaint", "sr", "blur", "tomography")
METHODS = ("pigdm", "dps")
WEIGHTS = ("score", "paper")


@dataclass(frozen=True)
class RestoreOptions:
    """The command line of ``stepfuse restore``; raises ValueError for what it cannot mean."""

    picture: Path | None
    task: str
    demo: bool
    images: int | None
    mask: Path | None
    pad: int | None
    factor: int | None
    sigma: float | None
    angles: int | None
    noise: float
    model: str
    method: str
    weight: str | None
    data_std: float | None
    scale: float | None
    steps: str
    eta: float
    label: str | None
    guidance: float
    count: int
    seed: int
    out: Path
    std: Path | None
    batch_size: int
    backend: str
    device: str
    threads: int | None

    def __post_init__(self) -> None:
        for name, word, accepted in (
            ("--task", self.task, TASKS),
            ("--method", self.method, METHODS),
            ("--weight", self.weight, WEIGHTS),
        ):
            if word is not None and word not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {word!r}")
        for name, value in (
            ("-n", self.count), ("--images", self.images), ("--batch-size", self.batch_size),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        check_threads("--threads", self.threads)
        if not abs(self.guidance) < float("inf"):
            raise ValueError(f"--guidance must be a finite number; got {self.guidance}")
        self._check_places()
        self._check_belonging()

    def _check_places(self) -> None:
        for name, path in (("--out", self.out), ("--std", self.std)):
            if path is not None and (path.suffix.lower() != ".png" or not path.stem.strip(".")):
                raise ValueError(f"{name} must end in .png; got {str(path)!r}")
        if self.std is not None:
            if self.count < 2:
                raise ValueError(f"--std needs several samples: -n 2 or more; got {self.count}")
            if self.std.resolve() == self.out.resolve():
                raise ValueError(f"--std must be another file than --out; got {str(self.std)!r}")

    def _check_belonging(self) -> None:
        """Each setting belongs to a task or a method, and means nothing elsewhere."""
        for name, value, needed, there in (
            ("--mask", self.mask, "--task inpaint", self.task == "inpaint"),
            ("--pad", self.pad, "--task outpaint", self.task == "outpaint"),
            ("--factor", self.factor, "--task sr", self.task == "sr"),
            ("--sigma", self.sigma, "--task blur", self.task == "blur"),
            ("--angles", self.angles, "--task tomography", self.task == "tomography"),
            ("--weight", self.weight, "--method pigdm", self.method == "pigdm"),
            ("--data-std", self.data_std, "--method pigdm", self.method == "pigdm"),
            ("--scale", self.scale, "--method dps", self.method == "dps"),
            ("--images", self.images, "--demo and no picture", self.demo and not self.picture),
        ):
            if value is not None and not there:
                raise ValueError(f"{name} belongs to {needed}; got {name} {value} without")
        if self.picture is None and not self.demo:
            raise ValueError("give a picture of what was measured, or --demo to try it")
        if self.task == "inpaint" and self.mask is None and not self.demo:
            raise ValueError("--task inpaint needs --mask, a picture: white where it is missing")

    @property
    def less_memory(self) -> str:
        """What makes the command need less."""
        return f"fewer samples at a time need less (--batch-size, now {self.batch_size})"
