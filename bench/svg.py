"""Figures of matplotlib as SVG that belongs to a page: its colours, its font, ids of their own."""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import re
from collections.abc import Iterator
from typing import Any

from stepfuse.kernels.backends import BackendUnavailable

# Stand-ins that the page's custom properties replace, so that a plot follows the light and the dark
# scheme. Peers and ours take theirs in turn.
INK, MUTED, RULE, PAPER = "#fd0001", "#fd0002", "#fd0003", "#fd0004"
OURS = ("#fe0001", "#fe0002", "#fe0003", "#fe0004")
PEERS = ("#ff0001", "#ff0002", "#ff0003", "#ff0004", "#ff0005", "#ff0006", "#ff0007")
_PROPERTIES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper",
    **{colour: f"--ours-{n}" for n, colour in enumerate(OURS, 1)},
    **{colour: f"--peer-{n}" for n, colour in enumerate(PEERS, 1)},
}  # fmt: skip
WIDTH = 340  # points: on a phone a point is a pixel
TEXT = 12
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "stepfuse",  # the same figure, the same file
    "text.parse_math": False,
    "font.size": TEXT,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": TEXT - 0.5,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.limits": (-5, 7),
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": TEXT - 0.5,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def why_not() -> str:
    """Why no plot can be drawn here, and what to install; empty where one can."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        return f"the report's plots need matplotlib ({error}); pip install 'stepfuse[bench]'"
    return ""


@contextlib.contextmanager
def figure(height: float, name: str, description: str) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure of `WIDTH` by ``height`` points with axes; its SVG is in the list afterwards.

    ``name`` begins every id, and must be unique in the page; ``description`` is what a screen
    reader says. Raises BackendUnavailable where matplotlib is not installed.
    """
    if reason := why_not():
        raise BackendUnavailable(reason)
    matplotlib: Any = importlib.import_module("matplotlib")
    made: list[str] = []
    with matplotlib.rc_context(_STYLE):
        canvas = importlib.import_module("matplotlib.figure").Figure(
            figsize=(WIDTH / 72, height / 72), layout="constrained"
        )
        yield canvas, canvas.add_subplot(), made
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    made.append(_embedded(file.getvalue(), name, description))


def _embedded(document: str, name: str, description: str) -> str:
    """The svg element of a document, ready to stand in a page beside others."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", element)
    element = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r"; font-family: [^;\"]*", "", element)
    for colour, name_of_property in _PROPERTIES.items():
        element = element.replace(colour, f"var({name_of_property})")
    box = re.search(r'viewBox="[^"]*"', element)
    assert box is not None
    label = html.escape(description)
    opening = (
        f'<svg role="img" aria-label="{label}" {box.group()} '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"<svg[^>]*>", opening, element, count=1).rstrip() + "\n"
