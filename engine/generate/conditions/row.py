"""What one image of a job is made from, and whoever says it for every image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from stepfuse.kernels.checks import as_integer


@dataclass(frozen=True)
class Row:
    """The conditions of one image.

    Attributes:
        label: number of its class; the number of classes is the null class; None for a model
            without classes.
        seed: of this image, the int64 with the seed's 64 bits; None for the job's.
        guidance: scale of this image; None for the job's.
        extra: JSON values that go with the image and decide nothing. Images may share it.
    """

    label: int | None = None
    seed: int | None = None
    guidance: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Conditions(Protocol):
    """A pure function of an image's number, for any number of images in any order."""

    def settings(self) -> dict[str, Any]:
        """What decides the rows, in JSON; `from_settings` makes the same conditions of it."""

    def rows(self, first: int, count: int) -> list[Row]:
        """Those of images first .. first+count-1.

        The last row of a file is repeated past its end, for the images that fill up a batch.
        """

    def check(self, n: int) -> None:
        """Raise ValueError, with both numbers, where there are no rows for ``n`` images."""


def check_span(first: int, count: int) -> None:
    """Raise unless ``first`` and ``count`` say which images are meant."""
    for name, value in (("first", first), ("count", count)):
        if as_integer(name, value) < 0:
            raise ValueError(f"{name} must be at least 0; got {value}")
