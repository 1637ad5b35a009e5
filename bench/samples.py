"""Samples in a few numbers: percentiles, spread, and ratios pair by pair."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Samples in a few numbers.

    Attributes:
        count: of samples.
        median, p95, p99: percentiles, interpolated between samples. With fewer than 20 samples the
            p95 is close to the largest, with fewer than 100 the p99.
        mad: median absolute deviation from the median, a measure of spread that one disturbed
            sample does not move.
        least: the smallest.
    """

    count: int
    median: float
    p95: float
    p99: float
    mad: float
    least: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Raises ValueError where there are none."""
        median = percentile(samples, 50)
        return cls(
            len(samples),
            median,
            percentile(samples, 95),
            percentile(samples, 99),
            statistics.median(abs(sample - median) for sample in samples),
            min(samples),
        )


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between the two nearest samples: position (n - 1) percent / 100 of the sorted ones."""
    if not samples:
        raise ValueError("a percentile needs at least one sample; got none")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in 0 .. 100; got {percent}")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round; a round that only one of them finished is left out."""
    return [a / b for a, b in zip(numerator, denominator, strict=False)]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median of `ratios`."""
    return statistics.median(ratios(numerator, denominator))
