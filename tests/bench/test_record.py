"""Records: what is written is what is read, and what is wrong is named."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.bench.example_record import example, example_roofline, example_suite

from stepfuse.bench import record as records
from stepfuse.bench.record import Record, load
from stepfuse.bench.samples import Summary, percentile, ratios


@pytest.mark.parametrize("make", [example, example_suite, example_roofline])
def test_what_is_written_is_read(make: Callable[[], Record], tmp_path: Path) -> None:
    record = make()
    record.save(tmp_path / "record.json")
    assert load(tmp_path / "record.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_the_example_fills_every_field() -> None:
    """So that whoever draws it has drawn everything."""
    empty = Record(kind="suite", machine=example().machine)
    for name in ("settings", "candidates", "suite", "roofline"):
        assert any(getattr(m(), name) for m in (example, example_suite, example_roofline)), name
    candidates = example().candidates
    for field in fields(records.Candidate):
        assert any(getattr(c, field.name) for c in candidates), field.name
    assert not any(is_dataclass(v) for v in (empty.settings, *empty.candidates))


def written(tmp_path: Path, change: Callable[[Any], None]) -> Path:
    path = tmp_path / "record.json"
    example().save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def set_seconds(value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        data["candidates"][1]["latency"][2]["seconds"][3] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_seconds("fast"), r"candidates\[1\].latency\[2\].seconds\[3\] must be a number; got"),
        (set_seconds(True), "must be a number; got True"),
        (set_seconds(-1.0), "seconds, batch and steps must be above 0"),
        (lambda d: d["machine"].pop("isa"), "record.machine.isa is missing"),
        (lambda d: d["machine"].update(colour="red"), "has no field 'colour'; accepted: processor"),
        (lambda d: d.update(schema="other-3"), "its schema is 'other-3'; accepted: 'stepfuse-"),
        (lambda d: d.pop("schema"), "has no field 'schema'"),
        (lambda d: d.update(kind="suite"), "settings belong to kind 'sampler'"),
        (lambda d: d.update(kind="poem"), "must be one of 'sampler', 'suite', 'roofline'"),
        (lambda d: d.update(candidates={}), "record.candidates must be a list"),
        (lambda d: d["settings"].update(steps=2.5), "settings.steps must be a whole number"),
        (lambda d: d["candidates"][0].update(name="diffusers"), "names of their own"),
        (lambda d: d["candidates"][0]["verified"].update(passed=False), "were not verified"),
        (lambda d: d["candidates"][0].update(verified=None), "were not verified"),
        (lambda d: d["candidates"][0]["throughput"][0]["images"].pop(), "images and seconds"),
    ],
)
def test_a_wrong_field_is_named(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    path = written(tmp_path, change)
    with pytest.raises(ValueError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"record"'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no record of stepfuse bench"):
        load(path)


def test_a_record_that_contradicts_itself_is_not_written(tmp_path: Path) -> None:
    record = example()
    assert record.candidates[0].verified is not None
    record.candidates[0].verified.passed = False
    with pytest.raises(ValueError, match="were not verified"):
        record.save(tmp_path / "record.json")
    assert not list(tmp_path.iterdir())


def test_an_unknown_candidate_is_named_with_those_there_are() -> None:
    with pytest.raises(KeyError, match="no candidate 'tvm'; there are: stepfuse, stepfuse-eager"):
        example().candidate("tvm")


@pytest.mark.parametrize("count", [1, 2, 5, 20, 101])
def test_percentiles_are_numpys(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(size=count)
    for percent in (0, 5, 50, 95, 99, 100):
        assert percentile(samples.tolist(), percent) == pytest.approx(
            np.percentile(samples, percent), rel=1e-12
        )


def test_the_spread_is_not_moved_by_one_disturbed_sample() -> None:
    calm = [1.0, 1.1, 0.9, 1.05, 0.95]
    disturbed = [*calm, 100.0]
    assert Summary.of(calm).median == statistics.median(calm)
    assert Summary.of(calm).mad == pytest.approx(0.05)
    assert Summary.of(disturbed).mad < 0.1
    assert Summary.of(disturbed).least == 0.9
    assert Summary.of(disturbed).count == 6


def test_no_samples_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Summary.of([])
    with pytest.raises(ValueError, match=r"0 \.\. 100; got 101"):
        percentile([1.0], 101)


def test_ratios_are_pair_by_pair() -> None:
    """A machine that slows down meets both of a pair; an unfinished round is left out."""
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0]) == [2.0, 2.0]
