"""One image that a job has made, on its way into a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Made:
    """Image ``n`` of a job and what is written beside it.

    Attributes:
        n: its number.
        pixels: uint8 [H, W, C] with one channel or three; or float32 [C, H, W] for formats that
            take samples.
        label: its class, -1 for "no class", None where the model has none.
        extra: JSON values that go with it: name of the class, seed, guidance, further columns.
    """

    n: int
    pixels: NDArray[Any]
    label: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
