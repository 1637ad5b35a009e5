"""Which batch sizes an exported network is for."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

LARGEST = 2**31 - 1  # as sizes are counted by the runtimes
_FORMS = "'1:8:64' (MIN:OPT:MAX), or one size"


@dataclass(frozen=True)
class BatchProfile:
    """The smallest, the most frequent and the largest batch; raises ValueError unless in order."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        for name in ("minimum", "optimum", "maximum"):
            object.__setattr__(self, name, _whole(getattr(self, name)))
        if not 1 <= self.minimum <= self.optimum <= self.maximum <= LARGEST:
            raise ValueError(
                f"batch must be MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= {LARGEST}; got {self}"
            )

    @classmethod
    def parse(cls, text: str | int | BatchProfile) -> BatchProfile:
        """ "1:8:64"; "8" is the fixed batch "8:8:8". Raises ValueError for anything else."""
        if isinstance(text, BatchProfile):
            return text
        words = text.split(":") if isinstance(text, str) else [str(_whole(text))]
        if len(words) not in (1, 3) or not all(w.isascii() and w.isdecimal() for w in words):
            raise ValueError(f"batch must be {_FORMS}; got {text!r}")
        sizes = [int(word) for word in words]
        return cls(*sizes) if len(sizes) == 3 else cls(*sizes * 3)

    @property
    def fixed(self) -> bool:
        """Whether there is only one size."""
        return self.minimum == self.maximum

    def takes(self, batch: int) -> bool:
        """Whether a batch is inside the profile."""
        return self.minimum <= batch <= self.maximum

    def check(self, batch: int) -> None:
        """Raise ValueError for a batch outside the profile."""
        if not self.takes(batch):
            raise ValueError(
                f"batch {batch} is outside the profile; accepted: {self.minimum} .. {self.maximum}"
            )

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


def _whole(size: Any) -> int:
    """One batch size; this module is read before torch is."""
    try:
        if isinstance(size, bool) or (hasattr(size, "shape") and size.shape != ()):
            raise TypeError
        return operator.index(size)
    except TypeError:
        raise TypeError(f"batch must be {_FORMS}; got {type(size).__name__}") from None
