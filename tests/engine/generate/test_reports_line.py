"""On a terminal one line that writes over itself, otherwise a line every half a minute."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tests.engine.generate.reports_case import (
    Clock,
    Full,
    Terminal,
    begun,
    in_many_orders,
    record,
    work,
)

from stepfuse.engine.generate.reports.line import Line
from stepfuse.engine.generate.reports.lines import Lines
from stepfuse.engine.generate.reports.outlet import Outlet
from stepfuse.engine.generate.reports.several import progress

ROOT = Path(__file__).parents[3]
FIRST = "12,000/50,000  0.0/s (w0 - w1 -)  ETA unknown  writer -  failed 0"


def screen(written: str, width: int = 1000) -> list[str]:
    """What a terminal shows: a carriage return goes back, and nothing else moves."""
    rows, column = [""], 0
    for character in written:
        if character == "\r":
            column = 0
        elif character == "\n":
            rows.append("")
            column = 0
        else:
            rows[-1] = rows[-1][:column] + character + rows[-1][column + 1 :]
            column += 1
            assert column < width, "the last column is to stay empty"
    return [row.rstrip() for row in rows]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> Terminal:
    return Terminal()


def test_the_line_is_written_over(clock: Clock, stream: Terminal) -> None:
    line = Line(stream, clock, lambda: 100)
    line.begin(begun())
    assert stream.getvalue() == FIRST
    line.up(0, True)
    line.up(1, True)
    work(line, clock, 20, (16, 20))
    assert screen(stream.getvalue(), 100) == [
        "12,720/50,000  36.0/s (w0 16.0 w1 20.0)  ETA 17 min  writer -  failed 0"
    ]
    line.shard(0, record(12))
    line.shard(1, record(13))
    line.end()
    assert screen(stream.getvalue(), 100) == [
        "14,000/50,000  36.0/s  in 20 s  writer 3 %  failed 0",
        "",
    ]


def test_what_does_not_change_is_not_written_again(clock: Clock, stream: Terminal) -> None:
    line = Line(stream, clock, lambda: 100)
    line.begin(begun())
    before = stream.getvalue()
    line.tick()
    line.tick()
    assert stream.getvalue() == before


def test_sentences_are_above_it(clock: Clock, stream: Terminal) -> None:
    line = Line(stream, clock, lambda: 100)
    line.note("before")
    line.begin(begun())
    line.note("short")
    line.failed(123, 1, "ValueError: no\nmore", False)
    line.failed(123, 2, "x" * 200, True)
    line.note("n" * 300)
    assert screen(stream.getvalue()) == [
        "before",
        "short",
        "shard 000123 failed (attempt 1): ValueError: no more",
        f"shard 000123 failed (attempt 2, the last): {'x' * 200}",
        "n" * 300,
        FIRST.replace("failed 0", "failed 1"),
    ]
    line.end()
    line.note("after")
    assert screen(stream.getvalue())[-3:] == [
        "12,000/50,000  0.0/s  in 0 s  writer -  failed 1",
        "after",
        "",
    ]


@pytest.mark.parametrize("width", [0, 1, 2, 20, 66, 67, 80])
def test_it_fits_the_terminal(width: int, clock: Clock, stream: Terminal) -> None:
    line = Line(stream, clock, lambda: width)
    line.begin(begun())
    line.up(0, True)
    work(line, clock, 5, (16, 0))
    line.end()
    shown = stream.getvalue().replace("\n", "\r").split("\r")
    assert max(map(len, shown)) <= max(1, width - 1)
    assert len(screen(stream.getvalue(), max(2, width))) == 2


def test_a_terminal_that_becomes_narrow(clock: Clock, stream: Terminal) -> None:
    widths = iter([100] + [40] * 100)
    line = Line(stream, clock, lambda: next(widths))
    line.begin(begun())
    line.failed(1, 1, "no", True)
    assert stream.getvalue().splitlines()[-1] == "12,000/50,000  0.0/s  ETA unknown  writ"


@pytest.mark.parametrize("kind", [Line, Lines])
def test_a_stream_that_takes_nothing_is_left_alone(kind: type[Line | Lines], clock: Clock) -> None:
    stream = Full()
    in_many_orders(kind(stream, clock))
    assert stream.tries == 1
    in_many_orders(kind(None, clock))


@pytest.mark.parametrize("kind", [Line, Lines])
def test_a_stream_that_is_closed_is_left_alone(kind: type[Line | Lines], clock: Clock) -> None:
    stream = io.StringIO()
    stream.close()
    in_many_orders(kind(stream, clock))
    assert not Outlet(stream).is_terminal


@pytest.mark.parametrize("kind", [Line, Lines])
def test_any_order_of_calls(kind: type[Line | Lines], clock: Clock, stream: Terminal) -> None:
    in_many_orders(kind(stream, clock))
    assert "\n" in stream.getvalue()


@pytest.mark.parametrize("kind", [Line, Lines])
def test_an_end_alone_says_nothing(
    kind: type[Line | Lines], clock: Clock, stream: Terminal
) -> None:
    report = kind(stream, clock)
    report.end()
    report.tick()
    assert stream.getvalue() == ""


def test_an_end_is_said_once(clock: Clock, stream: Terminal) -> None:
    lines = Lines(stream, clock)
    lines.begin(begun())
    lines.end()
    lines.end()
    assert len(stream.getvalue().splitlines()) == 2


def test_a_line_every_half_a_minute(clock: Clock) -> None:
    stream = io.StringIO()
    lines = Lines(stream, clock)
    lines.begin(begun())
    lines.up(0, True)
    lines.up(1, True)
    work(lines, clock, 100, (16, 20))
    lines.note("a word")
    lines.failed(40, 3, "ValueError: no", True)
    lines.end()
    assert stream.getvalue().splitlines() == [
        "run/: 12,000 of 50,000 images done, 38 of 50 shards to be made by 2 workers of 1 thread",
        "13,080/50,000  36.0/s (w0 16.0 w1 20.0)  ETA 17 min  writer -  failed 0",
        "13,960/50,000  36.0/s (w0 16.0 w1 20.0)  ETA 17 min  writer -  failed 0",
        "14,000/50,000  36.0/s (w0 16.0 w1 20.0)  ETA 17 min  writer -  failed 0",
        "a word",
        "shard 000040 failed (attempt 3, the last): ValueError: no",
        "12,000/50,000  0.0/s  in 2 min  writer -  failed 1",
    ]


def test_a_stream_without_the_letters() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    Outlet(stream).write("rün/\n")
    assert written.getvalue() == b"r\\xfcn/\n"


def test_the_stream_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress(Terminal()), Line)
    assert isinstance(progress(io.StringIO()), Lines)
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(progress(), Lines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress(Terminal()), Lines)


def test_the_width_is_that_of_the_terminal() -> None:
    ours, theirs = pty.openpty()
    try:
        with open(theirs, "w", closefd=False) as stream:
            assert Outlet(stream).is_terminal
            assert Outlet(stream).width == 80  # it has none
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 132, 0, 0))
            assert Outlet(stream).width == 132
    finally:
        os.close(ours)
        os.close(theirs)
    assert Outlet(io.StringIO()).width == Outlet(None).width == 80


def test_stderr_without_a_reader_does_not_end_the_job() -> None:
    code = """
import sys
from tests.engine.generate.reports_case import in_many_orders
from stepfuse.engine.generate.reports.line import Line
from stepfuse.engine.generate.reports.several import progress
in_many_orders(progress())
in_many_orders(Line(sys.stderr))
print("went on")
"""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=writer,
            text=True,
        )
    finally:
        os.close(writer)
    assert found.stdout == "went on\n"
