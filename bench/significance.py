"""Whether two sets of timings differ by more than they scatter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A comparison looks at dozens of figures: at 95 % some of them would change by chance.
CONFIDENCE = 0.99
RESAMPLES = 2000
# Two runs of the same program differ by more than the samples of one run scatter: memory lies
# elsewhere, the processor's clock has changed. Closer to 1 than this is never called a difference.
SAME = 0.03
FEW, SAME_OF_FEW = 5, 0.10  # under 5 samples, which do not tell how far they scatter
WITHIN = "within the spread"


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and the interval that holds it with `CONFIDENCE`.

    Closer to 1 than ``same`` it is no difference, wherever the interval lies.
    """

    value: float
    low: float
    high: float
    same: float = SAME

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "within the spread", of the numerator."""
        if self.low > 1 and self.value > 1 + self.same:
            return "slower"
        if self.high < 1 and self.value < 1 / (1 + self.same):
            return "faster"
        return WITHIN

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio_of_medians(new: Sequence[float], old: Sequence[float]) -> Ratio:
    """median(new) / median(old) with its percentile-bootstrap interval; always the same.

    Both are resampled by themselves, as samples of two runs are not pairs. ValueError where a side
    has no samples, or one that is not positive.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (new, old)]
    for side in sides:
        if side.size == 0 or not (side > 0).all():
            raise ValueError(f"samples must be positive and at least one; got {side.tolist()}")
    generator = np.random.default_rng(0)
    drawn = [
        np.median(side[generator.integers(0, side.size, (RESAMPLES, side.size))], axis=1)
        for side in sides
    ]
    low, high = np.quantile(drawn[0] / drawn[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.median(sides[0]) / np.median(sides[1]))
    few = min(side.size for side in sides) < FEW
    return Ratio(value, float(low), float(high), SAME_OF_FEW if few else SAME)
