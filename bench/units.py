"""Figures in words: three digits and a unit, as in "12.3 ms"."""

from __future__ import annotations

import math


def seconds(value: float) -> str:
    """A time in s, ms, us or ns."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return f"{digits(value / 1e-9)} ns"


def size(value: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << power:
            return f"{digits(value / (1 << power))} {unit}"
    return f"{digits(value)} B"


def digits(value: float) -> str:
    """Three of them where there is a point: 0.123, 12.3, 1234."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    rounded = round(value, decimals)
    if rounded:
        decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))  # 9.996 is 10.0
    return f"{rounded:.{decimals}f}"


def small(value: float) -> str:
    """A difference: two digits and a power of ten; "0" where there is none at all."""
    return "0" if value == 0 else f"{value:.1e}"


def joules(value: float) -> str:
    """An energy."""
    return f"{digits(value)} J"


def count(number: int, noun: str) -> str:
    """So many of something: 1 thread, 2 threads."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
