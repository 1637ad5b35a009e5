"""Charts: what is drawn where, in both of their forms."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from stepfuse.engine.files import charts
from stepfuse.engine.files.charts import SHARP, Chart, Curve, below, beside


def chart(*points: tuple[float, float], **settings: bool) -> Chart:
    return Chart("title <1>", "x & y", "height", [Curve("end", points)], **settings)


def drawn(made: Chart) -> list[tuple[float, float]]:
    """The curve of an SVG, in points of the canvas."""
    (line,) = re.findall(r'points="([^"]*)"[^>]*stroke="#00788a"', made.svg())
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())]


def test_a_curve_goes_where_it_should() -> None:
    (left, bottom), (middle, half), (right, top) = drawn(chart((0, 0), (1, 5), (2, 10)))
    assert left < middle < right
    assert top < half < bottom
    assert middle == pytest.approx((left + right) / 2, abs=0.01)
    assert half == pytest.approx((top + bottom) / 2, abs=0.01)


def test_a_logarithm_has_equal_ratios_and_leaves_out_what_it_cannot_show() -> None:
    points = [(1, 1.0), (2, 10.0), (3, 0.0), (4, -1.0), (5, 100.0), (6, math.nan), (7, math.inf)]
    first, second, third = drawn(chart(*points, log_y=True))
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.02)


def test_x_may_fall() -> None:
    (first, _), (second, _) = drawn(chart((5, 1), (0, 2), falling_x=True))
    assert first < second


@pytest.mark.parametrize(
    "points", [[], [(1, 1)], [(0, 0), (0, 0)], [(1, 3), (1, 3)], [(1e-30, 1e30), (2e-30, 2e30)]]
)
@pytest.mark.parametrize("log_y", [True, False])
def test_whatever_there_is_to_show(points: list[tuple[float, float]], log_y: bool) -> None:
    made = chart(*points, log_y=log_y)
    assert "nan" not in made.svg()
    assert made.pixels().shape == (SHARP * made.height, SHARP * made.width, 3)


def test_words_are_escaped() -> None:
    assert "title &lt;1&gt;" in chart((0, 1), (1, 2)).svg()
    assert "x &amp; y" in chart((0, 1), (1, 2)).svg()


def test_pixels_have_the_curve() -> None:
    """Along the diagonal there is its colour, and below it there is paper."""
    made = chart((0, 0), (1, 1))
    pixels, (start, stop) = made.pixels(), drawn(made)
    for share in (0.25, 0.6):
        x, y = (round(SHARP * (a + share * (b - a))) for a, b in zip(start, stop, strict=True))
        found = pixels[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3).astype(int)
        assert (np.abs(found - [0, 0x78, 0x8A]).sum(1) < 30).any()


@pytest.mark.parametrize(("least", "step"), [(0.3, 0.5), (1, 1), (1.1, 2), (7, 10), (0.02, 0.02)])
def test_steps_between_ticks_are_round(least: float, step: float) -> None:
    assert charts._round_step(least) == pytest.approx(step)


def test_pictures_are_joined() -> None:
    a, b = np.zeros((2, 3, 3), np.uint8), np.ones((4, 5, 3), np.uint8)
    row, column = beside([a, b]), below([a, b])
    assert (row.shape, column.shape) == ((4, 8, 3), (6, 5, 3))
    assert (row[2:, :3] == 255).all()
    assert (column[:2, 3:] == 255).all()
    assert (row[:, 3:] == 1).all()
