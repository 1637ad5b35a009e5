"""What is said, to the letter."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.engine.generate.reports_case import begun

from stepfuse.engine.generate.reports import text
from stepfuse.engine.generate.reports.meter import Meter, Reading

READING = Reading(
    images=12_345,
    images_in_place=12_000,
    images_wanted=50_000,
    shards_done=12,
    shards_failed=0,
    shards=50,
    rate=35.1,
    workers={0: 17.6, 1: 17.5},
    eta=18 * 60 + 10.0,
    writer_wait=3.0,
    writer_share=0.03,
    seconds=350.0,
    mean=34.8,
)
LINE = "12,345/50,000  35.1/s (w0 17.6 w1 17.5)  ETA 18 min  writer 3 %  failed 0"
MANY = replace(READING, rate=1133.2, workers={k: 17.2 + 0.9 * k / 63 for k in range(64)})


def test_the_line() -> None:
    assert text.status(READING) == LINE
    assert text.status(READING, len(LINE)) == LINE


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (73, LINE),
        (72, "12,345/50,000  35.1/s  ETA 18 min  writer 3 %  failed 0"),
        (55, "12,345/50,000  35.1/s  ETA 18 min  writer 3 %  failed 0"),
        (54, "12,345/50,000  35.1/s  ETA 18 min  writer 3 %  failed "),
        (10, "12,345/50,"),
        (1, "1"),
    ],
)
def test_it_is_as_wide_as_the_terminal(width: int, line: str) -> None:
    assert text.status(READING, width) == line


def test_many_workers_are_summarised() -> None:
    line = "12,345/50,000  1,133/s (64 workers 17.2 .. 18.1)  ETA 18 min  writer 3 %  failed 0"
    assert text.status(MANY) == line
    assert text.status(MANY, 82) == line
    assert text.status(MANY, 81) == line.replace(" (64 workers 17.2 .. 18.1)", "")


def test_few_are_when_they_do_not_fit() -> None:
    workers = dict.fromkeys(range(8), 17.5)
    line = text.status(replace(READING, workers=workers), 80)
    assert line == (
        "12,345/50,000  35.1/s (8 workers 17.5 .. 17.5)  ETA 18 min  writer 3 %  failed 0"
    )
    assert "(w0 17.5 w1 17.5 " in text.status(replace(READING, workers=workers))


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({}, "35.1/s  ETA"),
        ({0: 35.1}, "35.1/s (w0 35.1)  ETA"),
        ({0: 17.6, 1: None}, "35.1/s (w0 17.6 w1 -)  ETA"),
        ({3: 0.0, 12: 0.0312}, "35.1/s (w3 0.0 w12 0.031)  ETA"),
        (dict(MANY.workers) | {5: None, 6: None}, "35.1/s (62 of 64 workers 17.2 .. 18.1)  ETA"),
        (dict.fromkeys(range(1000)), "35.1/s (0 of 1,000 workers)  ETA"),
    ],
)
def test_workers(workers: dict[int, float | None], words: str) -> None:
    assert words in text.status(replace(READING, workers=workers))


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (None, "  writer -  "),
        (0.0, "  writer 0 %  "),
        (0.1, "  writer 10 %  "),
        (0.104, "  writer-bound 10 %  "),
        (0.4321, "  writer-bound 43 %  "),
        (1.0, "  writer-bound 100 %  "),
    ],
)
def test_a_writer_that_is_too_slow_is_named(share: float | None, words: str) -> None:
    assert words in text.status(replace(READING, writer_share=share))


def test_without_a_rate_the_eta_is_unknown() -> None:
    reading = replace(READING, rate=0.0, workers={0: 0.0, 1: None}, eta=None)
    assert text.status(reading) == (
        "12,345/50,000  0.0/s (w0 0.0 w1 -)  ETA unknown  writer 3 %  failed 0"
    )


def test_a_hundred_million() -> None:
    reading = replace(
        READING, images=99_999_999, images_wanted=10**8, shards_failed=1234, eta=1e9, rate=0.1
    )
    assert text.status(reading) == (
        "99,999,999/100,000,000  0.1/s (w0 17.6 w1 17.5)  ETA 11,574 days  writer 3 %  failed 1,234"
    )


def test_nothing_at_all() -> None:
    assert text.status(Meter().read()) == "0/0  0.0/s  ETA 0 s  writer -  failed 0"


def test_the_conclusion() -> None:
    line = "12,345/50,000  34.8/s  in 6 min  writer 3 %  failed 0"
    assert text.conclusion(READING) == line
    assert text.conclusion(READING, 30) == line[:30]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (99, "99 s"),
        (99.4, "99 s"),
        (99.5, "2 min"),
        (18 * 60, "18 min"),
        (99 * 60 + 29, "99 min"),
        (99 * 60 + 31, "1 h 40 min"),
        (5 * 3600 + 1200, "5 h 20 min"),
        (48 * 3600 - 31, "47 h 59 min"),
        (48 * 3600, "2 days"),
        (12.4 * 86400, "12 days"),
        (1e13, "115,740,741 days"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert text.duration(seconds) == words


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (0, "0.0"),
        (1e-7, "1e-07"),
        (0.0004242, "0.00042"),
        (0.042, "0.042"),
        (0.94, "0.94"),
        (0.97, "1.0"),
        (17.55, "17.6"),
        (999.4, "999.4"),
        (999.6, "1,000"),
        (1234567.8, "1,234,568"),
    ],
)
def test_rates(rate: float, words: str) -> None:
    assert text.per_second(rate) == words


def test_the_beginning() -> None:
    assert text.beginning(begun()) == (
        "run/: 12,000 of 50,000 images done, 38 of 50 shards to be made by 2 workers of 1 thread"
    )
    assert text.beginning(begun(images=1, shards=1, workers=1, threads=4)) == (
        "run/: 12,000 of 1 image done, 38 of 1 shard to be made by 1 worker of 4 threads"
    )


def test_failures() -> None:
    assert text.failure(123, 1, "ValueError: no", False) == (
        "shard 000123 failed (attempt 1): ValueError: no"
    )
    assert text.failure(1_234_567, 3, "ValueError: no", True) == (
        "shard 1234567 failed (attempt 3, the last): ValueError: no"
    )
    assert len(text.failure(1, 1, "x" * 100_000, False)) < 600


def test_an_error_cannot_write_all_over_the_terminal() -> None:
    error = "RuntimeError: \x1b[2J\x1b]0;title\x07 one\r\ntwo\tthree\u202e"
    assert text.plain(error) == "RuntimeError: [2J ]0;title one two three"
