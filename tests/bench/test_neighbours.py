"""Processes that keep cores busy beside what is timed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests import signalled
from tests.bench.test_measure import OURS, bench
from tests.children import children, runs

from stepfuse.bench.measure import Bench, Plan
from stepfuse.bench.neighbours import neighbours, noted

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which lists children")


def _seconds(pid: int) -> float:
    """Of a processor that it has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@LINUX
def test_they_compute_until_the_block_is_left() -> None:
    before = children(os.getpid())
    with neighbours(2):
        found = [c for c in children(os.getpid()) if c not in before]
        assert len(found) == 2
        until = time.monotonic() + 30
        while time.monotonic() < until and min(map(_seconds, found)) < 0.2:
            time.sleep(0.05)
        assert min(map(_seconds, found)) >= 0.2
    assert children(os.getpid()) == before


@LINUX
def test_they_end_with_whoever_is_killed() -> None:
    code = """
import time
from stepfuse.bench.neighbours import neighbours
with neighbours(1):
    print("there", flush=True)
    time.sleep(600)
"""
    parent = signalled.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "there\n"
    (child,) = children(parent.pid)
    parent.kill()  # perhaps before the other one has looked whose child it is
    parent.wait()
    until = time.monotonic() + 30
    while time.monotonic() < until and runs(child):
        time.sleep(0.05)
    alone = runs(child)
    if alone:
        os.kill(child, signal.SIGKILL)
    assert not alone


@LINUX
def test_they_are_there_while_loops_are_timed_and_a_note_says_so(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = children(os.getpid()), []
    real = Bench._latency

    def latency(*args: object) -> None:
        during.append(len(children(os.getpid())) - len(before))
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Bench, "_latency", latency)
    monkeypatch.setattr(Bench, "_energy", lambda *_: pytest.fail("their energy would be ours"))
    record = bench(tiny, OURS[:1], batches=(1,), rounds=3, busy=1).run()
    assert during
    assert set(during) == {1}
    assert children(os.getpid()) == before
    assert noted(1) in record.notes
    assert not any("Timed beside" in note for note in bench(tiny, OURS[:1]).record.notes)


def test_how_many_there_may_be() -> None:
    for count in (-1, 257):
        with pytest.raises(ValueError, match=rf"--busy must be in 0\.\.256; got {count}"):
            Plan(busy=count)
    assert "2 busy processes" in noted(2)
