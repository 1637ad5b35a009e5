"""Line charts, drawn twice from one description: as SVG for pages and as pixels for PNG files.

Positions and sizes are in points of a canvas whose origin is at its top left.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stepfuse.engine.files.images import Pixels

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]
INK, MUTED, RULE, PAPER = "#1d2429", "#5c6670", "#d9d7d1", "#ffffff"
COLOURS = ("#00788a", "#c4552d", "#6b7886")
TEXT, SHARP = 12, 2  # points of a letter, pixels of a point
_SMOOTH = 2  # times as large before it is scaled down
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 34, 18, 44


@dataclass(frozen=True)
class Curve:
    """A line through (x, y) points; ``label`` stands at its end, where it is not empty."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """Curves over two axes, each with a title.

    Attributes:
        title: above the chart.
        x_title, y_title: what the axes mean, with their units.
        curves: with finite numbers; those that a logarithm cannot show are left out.
        log_y: whether equal distances are equal ratios.
        falling_x: whether x falls to the right.
        width, height: of the canvas.
    """

    title: str
    x_title: str
    y_title: str
    curves: Sequence[Curve]
    log_y: bool = False
    falling_x: bool = False
    width: int = 460
    height: int = 300

    def svg(self) -> str:
        """An svg element."""
        paint = _Svg()
        _draw(self, paint)
        size = f'viewBox="0 0 {self.width} {self.height}"'
        label = html.escape(f"{self.title}: {self.y_title} over {self.x_title}")
        return (
            f'<svg role="img" aria-label="{label}" {size} xmlns="http://www.w3.org/2000/svg" '
            f'font-family="system-ui, sans-serif" font-size="{TEXT}">\n{"".join(paint.parts)}'
            "</svg>\n"
        )

    def pixels(self) -> Pixels:
        """uint8 [`SHARP` height, `SHARP` width, 3]."""
        paint = _Canvas(self.width, self.height)
        _draw(self, paint)
        return paint.pixels()


def text_pixels(text: str, width: int, height: int, size: int = TEXT) -> Pixels:
    """A line of text in the middle of so many points: uint8 [SHARP height, SHARP width, 3]."""
    paint = _Canvas(width, height, size)
    paint.text((width / 2, height / 2 + size / 3), text, "middle", INK)
    return paint.pixels()


class _Paint(Protocol):
    def line(self, points: Sequence[Point], colour: str, width: float) -> None: ...

    def text(
        self, at: Point, text: str, anchor: Anchor, colour: str, upright: bool = False
    ) -> None: ...


def _draw(chart: Chart, paint: _Paint) -> None:
    curves = [Curve(c.label, _shown(c.points, chart.log_y)) for c in chart.curves]
    every = [point for curve in curves for point in curve.points] or [(0.0, 1.0), (1.0, 2.0)]
    x_axis = _Axis(sorted(x for x, _ in every), _LEFT, chart.width - _RIGHT, False)
    y_axis = _Axis(sorted(y for _, y in every), chart.height - _BOTTOM, _TOP, chart.log_y)
    if chart.falling_x:
        x_axis = x_axis.turned()
    for value in y_axis.ticks():
        y = y_axis.place(value)
        paint.line([(_LEFT, y), (chart.width - _RIGHT, y)], RULE, 0.7)
        paint.text((_LEFT - 6, y + TEXT / 3), _number(value), "end", MUTED)
    for value in x_axis.ticks():
        x = x_axis.place(value)
        paint.line([(x, chart.height - _BOTTOM), (x, chart.height - _BOTTOM + 4)], MUTED, 0.7)
        at = (x, chart.height - _BOTTOM + 6 + TEXT)
        paint.text(at, _number(value), "middle", MUTED)
    for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
        placed = [(x_axis.place(x), y_axis.place(y)) for x, y in curve.points]
        if len(placed) > 1:
            paint.line(placed, colour, 1.8)
        if curve.label and placed:
            x, y = placed[-1]
            paint.text((min(x, chart.width - _RIGHT) - 4, y - 6), curve.label, "end", colour)
    middle = (_TOP + chart.height - _BOTTOM) / 2
    paint.text((_LEFT, _TOP - 14), chart.title, "start", INK)
    at = ((_LEFT + chart.width - _RIGHT) / 2, chart.height - 6)
    paint.text(at, chart.x_title, "middle", MUTED)
    paint.text((TEXT, middle), chart.y_title, "middle", MUTED, upright=True)


def _shown(points: Sequence[Point], log: bool) -> list[Point]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [(x, y) for x, y in finite if y > 0] if log else finite


class _Axis:
    """Numbers between two places; ``values`` are sorted."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool) -> None:
        self.log, self.start, self.stop = log, start, stop
        low, high = values[0], values[-1]
        if log:
            self.low, self.high = math.log10(low), math.log10(high)
            if self.high - self.low < 1:
                self.low, self.high = math.floor(self.low), math.ceil(self.high + 1e-9)
        else:
            self.low, self.high = min(low, 0.0), high
        if not self.high > self.low:
            self.high = self.low + 1

    def turned(self) -> _Axis:
        self.start, self.stop = self.stop, self.start
        return self

    def place(self, value: float) -> float:
        position = math.log10(value) if self.log else value
        share = (position - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
            return [10.0**power for power in powers][:: math.ceil(len(powers) / 8)]
        step = _round_step((self.high - self.low) / 6)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{value:.10g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.0e}"


class _Svg:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def line(self, points: Sequence[Point], colour: str, width: float) -> None:
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
            'stroke-linejoin="round"/>\n'
        )

    def text(
        self, at: Point, text: str, anchor: Anchor, colour: str, upright: bool = False
    ) -> None:
        x, y = at
        turned = f' transform="rotate(-90 {x:.2f} {y:.2f})"' if upright else ""
        self.parts.append(
            f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" fill="{colour}"{turned}>'
            f"{html.escape(text)}</text>\n"
        )


class _Canvas:
    def __init__(self, width: int, height: int, size: int = TEXT) -> None:
        self.scale = SHARP * _SMOOTH
        self.image = Image.new("RGB", (width * self.scale, height * self.scale), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = _font(size * self.scale)

    def pixels(self) -> Pixels:
        width, height = self.image.size
        small = self.image.resize((width // _SMOOTH, height // _SMOOTH), Image.Resampling.LANCZOS)
        return np.asarray(small, dtype=np.uint8)

    def line(self, points: Sequence[Point], colour: str, width: float) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * self.scale), joint="curve")

    def text(
        self, at: Point, text: str, anchor: Anchor, colour: str, upright: bool = False
    ) -> None:
        x, y = (place * self.scale for place in at)
        letters = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        if not upright:
            self.draw.text((x, y), text, fill=colour, font=self.font, anchor=letters)
            return
        length = math.ceil(self.font.getlength(text))
        tall = math.ceil(1.5 * self.font.size)
        line = Image.new("RGB", (length, tall), PAPER)
        ImageDraw.Draw(line).text((0, tall * 0.7), text, fill=colour, font=self.font, anchor="ls")
        turned = line.rotate(90, expand=True)
        self.image.paste(turned, (round(x - tall * 0.7), round(y - length / 2)))


def _font(size: int) -> Any:
    """The font that comes with Pillow, which needs no file of the system's."""
    return ImageFont.load_default(size=size)


def beside(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures [H, W, 3] in a row, the lower ones filled up with paper."""
    return _joined(pictures, axis=1)


def below(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures [H, W, 3] in a column, the narrower ones filled up with paper."""
    return _joined(pictures, axis=0)


def _joined(pictures: Sequence[Pixels], axis: int) -> Pixels:
    other = 1 - axis
    most = max(picture.shape[other] for picture in pictures)
    filled = []
    for picture in pictures:
        rest = [(0, 0), (0, 0), (0, 0)]
        rest[other] = (0, most - picture.shape[other])
        filled.append(np.pad(picture, rest, constant_values=255))
    return np.concatenate(filled, axis=axis)
