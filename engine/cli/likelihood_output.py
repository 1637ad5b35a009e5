"""Where ``stepfuse likelihood`` writes: a picture, a page, or every number."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stepfuse.engine.files.charts import SHARP, Chart, Curve, below, beside, text_pixels
from stepfuse.engine.files.images import (
    MAX_SCALE,
    Pixels,
    encode_png,
    grid,
    to_pixels,
    upscale,
    viewable_scale,
)
from stepfuse.engine.files.writing import write_file
from stepfuse.engine.sampling.bound.result import Bound

_MOST_POINTS = 500  # of a curve
_HEADING = 58  # points before a row of the strip


@dataclass(frozen=True)
class Measured:
    """What is written.

    Attributes:
        settings: how to take the same bound again.
        bound: it.
        parts: of the bits.
        strip: what was known after them, [len(parts), n, C, H, W]; None for curves alone.
    """

    settings: Mapping[str, Any]
    bound: Bound
    parts: Sequence[float]
    strip: Tensor | None

    def known(self) -> list[dict[str, float | int | None]]:
        """Where the parts of the bits have been received, and what the error is there."""
        rate, rmse = self.bound.rate_distortion()
        found: list[dict[str, float | int | None]] = []
        for part in self.parts:
            i = self.bound.step_after(part)
            at = self.bound.timesteps[i] if i < len(self.bound.timesteps) else None
            found.append(
                {"part": part, "timestep": at, "rate": float(rate[i]), "rmse": float(rmse[i])}
            )
        return found

    def charts(self) -> list[Chart]:
        """Distortion over rate, and the terms over the timesteps."""
        rate, rmse = (values.tolist() for values in self.bound.rate_distortion())
        terms = self.bound.terms.mean(0).tolist()
        return [
            Chart(
                "What is known after how many bits",
                "rate, bits/dim",
                "RMSE, of 255",
                [Curve("", _thinned(list(zip(rate, rmse, strict=True))))],
            ),
            Chart(
                "Where the bits are",
                "timestep",
                "bits/dim of its term",
                [Curve("", _thinned(list(zip(self.bound.timesteps, terms, strict=True))))],
                log_y=True,
                falling_x=True,
            ),
        ]


def write(path: Path, measured: Measured) -> None:
    """Write it, whole or not at all, in the form that the ending asks for."""
    ending = path.suffix.lower()
    if ending == ".json":
        write_file(path, (json.dumps(document(measured), indent=1) + "\n").encode())
    elif ending == ".html":
        write_file(path, page(measured).encode())
    else:
        charts = beside([chart.pixels() for chart in measured.charts()])
        picture = charts if measured.strip is None else below([charts, strip(measured)])
        text = {"stepfuse": json.dumps(dict(measured.settings))}
        write_file(path, encode_png(picture, text))


def document(measured: Measured) -> dict[str, Any]:
    """Every number: means over the images, and the total of each."""
    bound = measured.bound
    rate, rmse = bound.rate_distortion()
    return {
        "settings": dict(measured.settings),
        "bits_per_dim": float(bound.total.mean()),
        "standard_error": bound.standard_error() if len(bound.total) > 1 else None,
        "prior": float(bound.prior.mean()),
        "decoder": float(bound.terms[:, -1].mean()),
        "totals": bound.total.tolist(),
        "timesteps": list(bound.timesteps),
        "terms": bound.terms.mean(0).tolist(),
        "x0_mse": bound.x0_mse.mean(0).tolist(),
        "eps_mse": bound.eps_mse.mean(0).tolist(),
        "rate": rate.tolist(),
        "rmse": rmse.tolist(),
        "known": measured.known(),
    }


def strip(measured: Measured) -> Pixels:
    """A column for every image and a row for every part of the bits, with its name before it."""
    assert measured.strip is not None
    frames = np.stack([to_pixels(frame) for frame in measured.strip])
    scale = min(MAX_SCALE, SHARP * viewable_scale(*frames.shape[2:4]))
    rows = []
    for part, frame in zip(measured.parts, frames, strict=True):
        row = grid(upscale(frame, scale), len(frame), background=255)
        if row.ndim == 2:
            row = np.repeat(row[..., None], 3, axis=2)
        name = text_pixels(_percent(part), _HEADING, -(-len(row) // SHARP))
        rows.append(beside([name[: len(row)], row]))
    return below(rows)


def _percent(part: float) -> str:
    return f"{100 * part:g} %"


def page(measured: Measured) -> str:
    """A page of its own: charts, images, and a table of the parts."""
    bound, settings = measured.bound, measured.settings
    image = base64.b64encode(encode_png(strip(measured))).decode()
    spread = f" &plusmn; {bound.standard_error():.2g}" if len(bound.total) > 1 else ""
    rows = "".join(
        f"<tr><td>{100 * part:g} %</td><td>{found['rate']:.4f}</td>"
        f"<td>{found['rmse']:.2f}</td>"
        f"<td>{'the image itself' if found['timestep'] is None else found['timestep']}</td></tr>"
        for part, found in zip(measured.parts, measured.known(), strict=True)
    )
    said = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in settings.items()
    )
    figures = "".join(f"<figure>{chart.svg()}</figure>" for chart in measured.charts())
    return _PAGE.format(
        title=html.escape(f"{settings['model']} on {settings['data']}"),
        bits=f"{float(bound.total.mean()):.4f}{spread}",
        prior=f"{float(bound.prior.mean()):.3g}",
        between=f"{float(bound.terms[:, :-1].sum(1).mean()):.4f}",
        decoder=f"{float(bound.terms[:, -1].mean()):.4f}",
        figures=figures,
        image=image,
        rows=rows,
        said=said,
    )


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about 500 of them, both ends and every few between."""
    every = max(1, len(points) // _MOST_POINTS)
    kept = points[:-1:every]
    return [*kept, points[-1]]


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1d2429; background: #fff; margin: 0 auto;
  max-width: 960px; padding: 24px 20px; }}
.figures {{ display: flex; flex-wrap: wrap; gap: 16px; }}
figure {{ margin: 0; flex: 1 1 400px; }}
svg {{ width: 100%; height: auto; }}
img {{ max-width: 100%; height: auto; image-rendering: pixelated; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: right; padding: 4px 16px 4px 0; border-bottom: 1px solid #d9d7d1; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; color: #5c6670; }}
dd {{ margin: 0; }}
</style>
<h1>{title}</h1>
<p><strong>{bits} bits/dim</strong>: L<sub>T</sub> {prior}, the terms between {between}, the decoder
{decoder}.</p>
<div class="figures">{figures}</div>
<h2>Progressive lossy compression</h2>
<p>What the model predicts of the images when these parts of the bits have been received.</p>
<p><img alt="A row for each part of the bits, a column for each image"
src="data:image/png;base64,{image}"></p>
<table><thead><tr><th>part</th><th>bits/dim</th><th>RMSE of 255</th><th>timestep</th></tr></thead>
<tbody>{rows}</tbody></table>
<h2>Settings</h2>
<dl>{said}</dl>
</html>
"""
