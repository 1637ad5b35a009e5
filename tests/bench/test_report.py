"""The report: one file with everything in it, and plots that show what the samples say."""

from __future__ import annotations

import base64
import json
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.bench.example_record import example, example_roofline, example_suite

from stepfuse.bench import report, svg
from stepfuse.bench.plots import Plot, looks, plots
from stepfuse.bench.record import Record, load
from stepfuse.kernels.backends import BackendUnavailable

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install 'stepfuse[bench]'")

VOID = {"meta", "link", "br", "img", "input", "hr"}
ALL = ["ratios", "steps", "throughput", "latencies", "split", "suites", "roofline"]


def everything() -> Record:
    record = example()
    record.suite, record.roofline = example_suite().suite, example_roofline().roofline
    return record


def without_loops() -> Record:
    """Little to draw."""
    record = example()
    record.candidates.clear()
    return record


class Parsed(HTMLParser):
    """What is in a page; AssertionError where a tag is closed that was not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return report.html(everything())


@pytest.fixture(scope="module")
def parsed(page: str) -> Parsed:
    return Parsed(page)


def test_ids_are_unique_and_references_lead_somewhere(page: str, parsed: Parsed) -> None:
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 100
    referred = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)
    assert referred
    assert {a or b for a, b in referred} <= set(ids)


def test_nothing_is_fetched(page: str, parsed: Parsed) -> None:
    for _, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    assert not re.search(r"@import|url\((?!#)", page)
    (policy,) = (a["content"] for a in parsed.all("meta") if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    addresses = set(re.findall(r"https?://[^\s\"'<]*", page))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_only_script_is_the_record(parsed: Parsed) -> None:
    assert parsed.all("script") == [{"type": "application/json", "id": "record"}]


def test_the_record_is_in_the_page_twice(page: str, parsed: Parsed, tmp_path: Path) -> None:
    record = everything()
    (inline,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    (link,) = (a["href"] for a in parsed.all("a") if a.get("download") == "record.json")
    assert link is not None
    for text in (inline, base64.b64decode(link.partition("base64,")[2]).decode()):
        (tmp_path / "record.json").write_text(text)
        assert load(tmp_path / "record.json") == record
        assert json.loads(text)["machine"]["processor"] == "Example CPU <9000> & friends"


def test_what_a_record_says_cannot_become_part_of_the_page() -> None:
    record = example()
    evil = "</script><script>alert(1)</script><b onclick='x'>&amp;\"$x_1$"
    record.machine.processor = record.command = evil
    record.notes = [evil]
    record.candidates[0].name = record.candidates[3].name = evil
    record.candidates[3].name += "!"
    record.candidates[-1].failure = evil
    parsed = Parsed(report.html(record))
    assert len(parsed.all("script")) == 1
    assert parsed.all("b") == []
    assert not any("onclick" in attributes for _, attributes in parsed.tags)
    assert sum(evil in text for text in parsed.texts) >= 6


def test_it_says_what_it_was_taken_on_and_what_not_to_conclude(parsed: Parsed) -> None:
    text = " ".join(" ".join(parsed.texts).split())
    for said in ("digits: 50 DDIM steps", "Example CPU <9000> & friends", "0123456789ab",
                 "An invented record.", "What not to conclude", "How to read this",
                 "stepfuse bench --model digits --against all", "torch 2.13.0", "16.0 GiB",
                 "pip install onnxruntime", "compiled for the card, not run"):  # fmt: skip
        assert said in text, said


def test_tables_scroll_inside_their_box_and_are_named(page: str, parsed: Parsed) -> None:
    boxes = [a for a in parsed.all("div") if a.get("class") == "box"]
    assert len(boxes) == page.count("<table>") >= 10
    assert all(a["role"] == "region" and a["aria-label"] and a["tabindex"] == "0" for a in boxes)
    assert re.search(r"\.box \{ overflow-x: auto;", page)


def test_plots_are_described(parsed: Parsed) -> None:
    drawings = parsed.all("svg")
    assert len(drawings) == len(ALL)
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 20
        assert "width" not in attributes  # as wide as its box


def test_the_headline_compares_equal_precisions(parsed: Parsed) -> None:
    record = example()
    text = " ".join(" ".join(parsed.texts).split())
    theirs, ours = (record.candidate(n).runs(1) for n in ("openvino", "stepfuse"))
    assert theirs is not None
    assert ours is not None
    pairs = [a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)]
    assert f"against the fastest peer in fp32 {statistics.median(pairs):.2f}×" in text
    assert "fastest peer in bf16" not in text  # the only one was wrong


def test_the_same_record_gives_the_same_page(page: str) -> None:
    assert report.html(everything()) == page


def by_name(record: Record) -> dict[str, Plot]:
    return {plot.name: plot for plot in plots(record)}


def test_plots_are_those_that_a_record_has_figures_for() -> None:
    assert list(by_name(everything())) == ALL
    record = example()
    for candidate in record.candidates:
        candidate.split, candidate.throughput, candidate.over_steps = None, [], []
    assert list(by_name(record)) == ["ratios", "latencies"]
    for candidate in record.candidates:  # one batch size is no curve
        candidate.throughput = example().candidate(candidate.name).throughput[:1]
    assert list(by_name(record)) == ["ratios", "latencies"]
    record.candidates = [c for c in record.candidates if c.ours]
    assert list(by_name(record)) == ["latencies"]
    record.candidates.clear()
    assert by_name(record) == {}
    assert Parsed(report.html(record))
    assert list(by_name(example_suite())) == ["suites"]
    assert list(by_name(example_roofline())) == ["roofline"]
    assert Parsed(report.html(example_suite()))
    assert Parsed(report.html(example_roofline()))


def bars(plot: Plot, colour: str) -> list[tuple[float, float]]:
    """Left and right of every bar of a colour, from the top; not the legend's."""
    paths = re.findall(r'<path d="([^"]*)"\s+clip-path="[^"]*" style="fill: ([^"]*)"', plot.svg)
    found = []
    for path, fill in paths:
        if fill.startswith(f"var({colour})"):
            points = [tuple(map(float, p)) for p in re.findall(r"([\d.]+) ([\d.]+)", path)]
            x, y = zip(*points, strict=True)
            found.append((min(y), min(x), max(x)))
    return [(left, right) for _, left, right in sorted(found)]


def test_bars_are_as_long_as_the_times_from_zero() -> None:
    """So that a bar twice as long is a time twice as long."""
    record = everything()
    plot = by_name(record)["split"]
    splits = [c.split for c in record.candidates if c.split]
    drawn = {part: bars(plot, colour) for part, colour in
             (("network", "--peer-1"), ("update", "--ours-1"), ("rest", "--ours-2"))}  # fmt: skip
    times = {part: [statistics.median(getattr(s, part)) for s in splits] for part in drawn}
    scale = (drawn["network"][0][1] - drawn["network"][0][0]) / times["network"][0]
    for part, found in drawn.items():
        lengths = [right - left for left, right in found]
        assert lengths == pytest.approx([t * scale for t in times[part]], rel=1e-3, abs=1e-3)
    for first, second in (("network", "update"), ("update", "rest")):
        ends = [right for _, right in drawn[first]]
        assert [left for left, _ in drawn[second]] == pytest.approx(ends, abs=1e-3)
    assert len({round(left, 3) for left, _ in drawn["network"]}) == 1


def test_the_roofline_shows_the_bound_of_one_card() -> None:
    record = example_roofline()
    plot = by_name(record)["roofline"]
    assert "H100 SXM" in plot.title
    fused, unfused = bars(plot, "--ours-1"), bars(plot, "--rule")
    assert len(fused) == len(unfused) == 2  # the variants, not the cards
    row = record.roofline[0]
    for (left, right), (_, far) in zip(fused, unfused, strict=True):
        ratio = row["unfused_microseconds"] / row["microseconds"]
        assert (far - left) / (right - left) == pytest.approx(ratio, rel=1e-3)


def test_rows_of_the_compiler_are_taken_as_they_are() -> None:
    from stepfuse.bench.roofline import Row

    rows = [Row(**row) for row in example_roofline().roofline]
    record = without_loops()
    assert 'id="plot-roofline"' in report.html(record, roofline=rows)
    assert 'id="plot-roofline"' not in report.html(record)
    assert record.roofline == []


def test_lines_pass_through_the_medians() -> None:
    """Over steps: with the axes from zero, a line of equal cost a step is straight through it."""
    record = example()
    plot = by_name(record)["steps"]
    line = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--ours-1\)', plot.svg)
    points = [re.findall(r"([\d.]+) ([\d.]+)", path) for path in line]
    (drawn,) = (p for p in points if len(p) == 3)
    c = record.candidate("stepfuse")
    runs = [*c.over_steps, c.runs(1)]
    y = [statistics.median(r.seconds) for r in runs if r is not None]
    heights = [float(b) for _, b in drawn]
    assert (heights[0] - heights[1]) / (heights[1] - heights[2]) == pytest.approx(
        (y[1] - y[0]) / (y[2] - y[1]), rel=1e-3
    )


def test_every_candidate_looks_different() -> None:
    record = example()
    seen = looks(record).values()
    assert len({(s.colour, s.marker) for s in seen}) == len(seen) == 6
    assert {s.colour for n, s in looks(record).items() if n.startswith("stepfuse")} <= set(svg.OURS)


def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    report.write(path, without_loops())
    before = path.read_bytes()
    assert before.endswith(b"</html>\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=r"need matplotlib .*pip install 'stepfuse\[bench"):
        report.write(path, example())
    assert "pip install" in report.why_not()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, suites = tmp_path / "record.json", tmp_path / "suites.json"
    example().save(record)
    example_suite().save(suites)
    out, merged = tmp_path / "report.html", tmp_path / "bench.json"
    options = ["--suites", str(suites), "--json", str(merged)]
    assert report.main([str(record), "--out", str(out), *options]) == 0
    assert 'id="plot-suites"' in out.read_text()
    found = load(merged)
    assert (found.candidates, found.suite) == (example().candidates, example_suite().suite)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"record": "gone.json"}, "gone.json"),
        ({"out": "no/folder.html"}, "does not exist"),
        ({"suites": "record.txt"}, "no file of the suites"),
        ({"record": "record.txt"}, "no record of stepfuse bench"),
    ],
)
def test_bad_files_are_said_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example().save(tmp_path / "record.json")
    (tmp_path / "record.txt").write_text('{"no": "record"}')
    names = {"record": "record.json", "out": "report.html", "suites": None} | change
    more = ["--suites", str(tmp_path / names["suites"])] if names["suites"] else []
    arguments = [str(tmp_path / names["record"]), "--out", str(tmp_path / names["out"]), *more]
    assert report.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.json", "record.txt"]
