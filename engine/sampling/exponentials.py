"""exp without its first terms, and what solvers in log-SNR make of it."""

from __future__ import annotations

import math

_NEAR = 0.5  # below it the series is summed, since the difference would be lost in rounding
_TERMS = 20  # 0.5^20 / 20! is 4e-25


def tail(x: float, order: int) -> float:
    """exp(x) - sum_{n < order} x^n / n!, without cancellation at a small x."""
    if abs(x) < _NEAR:
        return sum(x**n / math.factorial(n) for n in range(order + _TERMS, order - 1, -1))
    if order == 1:
        return math.expm1(x)
    return math.exp(x) - sum(x**n / math.factorial(n) for n in range(order))
