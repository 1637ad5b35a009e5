"""What a job is asked for: the words of the command line, before anything is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from stepfuse.engine.files.images import Rounding
from stepfuse.engine.generate.conditions.labels import ORDERS
from stepfuse.engine.generate.formats import Format, choose
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.typed import settle
from stepfuse.kernels.checks import check_word
from stepfuse.kernels.limits import check_seed, check_threads

MOST = 1 << 62  # images of a job


@dataclass(frozen=True)
class Settings:
    """The whole of `stepfuse generate`'s options that decide what is made.

    Attributes:
        model: an embedded checkpoint, a .safetensors file or "module:function".
        recipe: how it is sampled.
        seed: image n of a seed is always the same.
        labels: "turn", all classes take turns; "random", drawn uniformly, by seed and n alone.
        label: classes that take turns, by name or number, "none" for no class; all where it is
            empty.
        per_class: that many images of one class after the other instead.
        conditions: path of a CSV, JSONL or Parquet file with a row per image.
        per_row: images of each row; one where it is None.
        format: of a shard: "webdataset", "npz", "png", "webp", "jpeg", "parquet" or "npy".
        image: of the pictures inside a tar or Parquet file: "png", "webp" or "jpeg".
        quality: of JPEG.
        level: of PNG's compression, 0 to 9; None for the library's.
        rounding: "nearest", floor(127.5 (x + 1) + 1/2), or "truncate", as ADM does.
        features: "module:function" that takes uint8 [N, C, H, W] and gives [N, F].
        batch_size, shard_size, threads: chosen by a trial where they are None.
        device: "auto", "cpu", "cuda".
    """

    model: str = "digits"
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    labels: str = "turn"
    label: tuple[str, ...] = ()
    per_class: int | None = None
    conditions: str | None = None
    per_row: int | None = None
    format: str | None = None
    image: str = "png"
    quality: int = 95
    level: int | None = None
    rounding: Rounding = "nearest"
    features: str | None = None
    batch_size: int | None = None
    shard_size: int | None = None
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        settle(self)
        check_seed("--seed", self.seed)
        check_threads("--threads", self.threads)
        for name, value in (
            ("--batch-size", self.batch_size),
            ("--shard-size", self.shard_size),
            ("--per-class", self.per_class),
            ("--per-row", self.per_row),
        ):
            if value is not None and not 1 <= value <= MOST:
                raise ValueError(f"{name} must be in 1 .. {MOST}; got {value}")
        if self.batch_size and self.shard_size and self.shard_size % self.batch_size:
            raise ValueError(
                f"--shard-size must be a multiple of --batch-size {self.batch_size}, so that no "
                f"batch crosses a shard; got {self.shard_size}"
            )
        check_word("--labels", self.labels, ORDERS)
        if self.label and self.labels != "turn":
            raise ValueError(
                f"--labels {self.labels} and --label {self.label[0]} exclude each other"
            )
        if self.features is not None and ":" not in self.features:
            raise ValueError(f"--features must be module:function; got {self.features!r}")
        if self.features is not None and self.format == "npy":
            raise ValueError("--features takes pixels, and --format npy holds samples")

    def output(self) -> Format:
        """The format with its options; ValueError for options that do not fit it."""
        assert self.format is not None, "a job has settled for one"
        return choose(self.format, self.image, self.quality, self.level)

    def to_json(self) -> dict[str, Any]:
        """As job.json keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse; TypeError or ValueError for what is none."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}")
        given = dict(values)
        given["recipe"] = Recipe(**given.get("recipe", {}))
        given["label"] = tuple(given.get("label", ()))
        return cls(**given)


def check_count(n: int) -> None:
    """Raise ValueError for a number of images that no job has."""
    if not 1 <= n <= MOST:
        raise ValueError(f"-n must be in 1 .. {MOST}; got {n}")
