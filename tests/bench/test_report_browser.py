"""The report in a real browser: it renders, on a desk and on a phone, and fetches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.bench.browser import NAMES, Page, find
from tests.bench.example_record import example, example_roofline, example_suite

from stepfuse.bench import report

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install 'stepfuse[bench]'")
CHROMIUM = find()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is there (Debian: chromium)"
)

DESK, PHONE = (1280, 900), (390, 844)
PLOTS = 7
LEAST_TEXT = 9.0  # CSS pixels of a letter's height, on a phone
LEAST_CONTRAST = {"text": 4.5, "marks": 3.0}  # WCAG 2.1, 1.4.3 and 1.4.11
ROUNDING = 1.0  # CSS pixels

DRAWN = """[...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('path, use')].map(e => e.getBoundingClientRect());
  const texts = [...svg.querySelectorAll('text')].filter(e => e.textContent.trim()).map(e => {
    const r = e.getBoundingClientRect();
    return {text: e.textContent, left: r.left, right: r.right, top: r.top, bottom: r.bottom,
            size: parseFloat(getComputedStyle(e).fontSize) * box.width / svg.viewBox.baseVal.width};
  });
  return {id: figure.id, width: box.width, height: box.height, left: box.left, right: box.right,
          top: box.top, bottom: box.bottom, texts,
          marks: marks.filter(r => r.width + r.height > 0).length};
})"""

COLOURS = """(() => {
  const probe = document.createElement('i'); document.body.append(probe);
  const rgb = value => { probe.style.color = value;
    return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number); };
  const names = [...document.querySelector('style').textContent.matchAll(/--[\\w-]+(?=:)/g)];
  const found = Object.fromEntries(names.map(([n]) => [n, rgb(`var(${n})`)]));
  const plot = document.querySelector('#plot-split svg');
  found.drawn = [...plot.querySelectorAll('path')].map(e => getComputedStyle(e).fill);
  probe.remove(); return found;
})()"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = example()
    record.suite, record.roofline = example_suite().suite, example_roofline().roofline
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write(path, record)
    return path


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names as long as labels may be, a single batch size, and times of days."""
    record = example(faster=1e-5)
    for c in record.candidates:
        if c.name != "stepfuse-eager":  # one of them as it is
            c.name = f"{c.name}-with-a-very-long-name-indeed"
        del c.latency[1:]
    path = tmp_path_factory.mktemp("wordy") / "report.html"
    report.write(path, record)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with Page(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def complaints(page: Page) -> list[Any]:
    """What the browser says of the page in its console."""
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    return [event for kind in kinds for event in page.seen(kind)]


def requested(page: Page) -> set[str]:
    found = {event["request"]["url"] for event in page.seen("Network.requestWillBeSent")}
    return {url for url in found if not url.startswith("data:")}


@pytest.mark.parametrize("size", [DESK, PHONE, (320, 640)], ids=["desk", "phone", "small phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_renders_and_fetches_nothing(
    page: Page, file: Path, size: tuple[int, int], dark: bool
) -> None:
    page.open(file.as_uri(), *size, dark=dark)
    assert complaints(page) == []
    assert requested(page) == {file.as_uri()}
    assert page.evaluate("document.title") == "digits: 50 DDIM steps – stepfuse bench"
    found = page.evaluate(DRAWN)
    assert len(found) == PLOTS
    for plot in found:
        assert plot["width"] > 0.75 * min(size[0], 440), plot["id"]
        assert plot["height"] > 60, plot["id"]
        assert plot["marks"] >= 8, plot["id"]
        assert len(plot["texts"]) >= 4, plot["id"]
    # neither the page nor anything in it but the boxes of tables scrolls sideways
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= size[0]
    assert page.evaluate("document.body.scrollWidth") <= size[0]


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("which", ["file", "wordy"])
def test_labels_can_be_read(
    page: Page, which: str, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    """Large enough, inside their plot, none over another."""
    page.open(request.getfixturevalue(which).as_uri(), *size)
    for plot in page.evaluate(DRAWN):
        texts = plot["texts"]
        for a in texts:
            assert a["size"] >= LEAST_TEXT, (plot["id"], a)
            assert a["left"] >= plot["left"] - ROUNDING, (plot["id"], a)
            assert a["right"] <= plot["right"] + ROUNDING, (plot["id"], a)
            assert a["top"] >= plot["top"] - ROUNDING, (plot["id"], a)
            assert a["bottom"] <= plot["bottom"] + ROUNDING, (plot["id"], a)
        for n, a in enumerate(texts):
            for b in texts[:n]:
                across = min(a["right"], b["right"]) - max(a["left"], b["left"])
                along = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
                # boxes of lines are a little higher than their letters
                assert across <= ROUNDING or along <= 0.25 * a["size"], (plot["id"], a, b)


def test_wide_tables_scroll_in_their_own_box(page: Page, file: Path) -> None:
    page.open(file.as_uri(), *PHONE)
    found = page.evaluate(
        "[...document.querySelectorAll('.box')].filter(e => e.clientWidth)"
        ".map(e => [e.clientWidth, e.scrollWidth, getComputedStyle(e).overflowX])"
    )
    assert all(width <= PHONE[0] and overflow == "auto" for width, _, overflow in found)
    assert sum(inner > width for width, inner, _ in found) >= 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_stand_out(page: Page, file: Path, dark: bool) -> None:
    page.open(file.as_uri(), *DESK, dark=dark)
    colours = page.evaluate(COLOURS)
    drawn = colours.pop("drawn")
    card = colours["--card"]
    assert (_luminance(card) < 0.2) == dark
    for name in ("--ink", "--muted", "--ours-1"):
        for under in ("--card", "--paper"):
            assert _contrast(colours[name], colours[under]) >= LEAST_CONTRAST["text"], name
    for name, colour in colours.items():
        if name.startswith(("--ours", "--peer")):
            assert _contrast(colour, card) >= LEAST_CONTRAST["marks"], name
    # the plots take the page's colours: no path is left in a stand-in's red
    network = colours["--peer-1"]
    assert f"rgb({network[0]}, {network[1]}, {network[2]})" in drawn
    assert not any(fill.startswith(("rgb(253", "rgb(254", "rgb(255, 0")) for fill in drawn)


def _luminance(colour: list[float]) -> float:
    """Relative, as WCAG defines it."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: list[float], b: list[float]) -> float:
    bright, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="http://127.0.0.1:9/picture.png">',
        '<link rel="stylesheet" href="http://127.0.0.1:9/style.css">',
        "<script>console.error('ran')</script>",
        "<style>body { background: url(http://127.0.0.1:9/paper.png) }</style>",
    ],
)
def test_what_is_planted_is_stopped_and_seen(
    page: Page, file: Path, tmp_path: Path, planted: str
) -> None:
    """The checks above would see a page that fetches or runs something; its policy stops it."""
    other = tmp_path / "planted.html"
    other.write_text(file.read_text(encoding="utf-8").replace("<main>", f"<main>{planted}"))
    page.open(other.as_uri(), *PHONE)
    (said,) = complaints(page)
    assert "Content Security Policy" in said["entry"]["text"]
    assert "ran" not in str(page.seen("Runtime.consoleAPICalled"))


def test_a_page_that_is_too_wide_is_seen(page: Page, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "wide.html"
    text = file.read_text(encoding="utf-8")
    other.write_text(text.replace(".box { overflow-x: auto;", ".box {"))
    page.open(other.as_uri(), *PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") > PHONE[0]
