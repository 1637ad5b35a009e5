"""Signals reach the processes that tests start, also where the parent of the tests ignores them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.signalled import start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
TESTS = Path(__file__).parent
WAITING = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def ignored(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """As under nohup, or after ``trap "" INT`` in a shell."""
    number: signal.Signals = request.param
    before = signal.signal(number, signal.SIG_IGN)
    yield number
    signal.signal(number, before)


def test_a_signal_that_the_parent_ignores_ends_the_child(ignored: signal.Signals) -> None:
    child = start([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == b"ready"
    child.send_signal(ignored)
    _, error = child.communicate(timeout=30)
    assert child.returncode == -ignored
    assert (b"KeyboardInterrupt" in error) == (ignored is signal.SIGINT)


@pytest.mark.usefixtures("ignored", "ctrl_c")
def test_ctrl_c_is_heard_in_the_process_of_the_tests() -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_whoever_sends_a_signal_to_a_child_starts_it_so() -> None:
    senders = [
        path
        for path in TESTS.rglob("*.py")
        if ".send_signal(" in (text := path.read_text(encoding="utf-8")) and "start(" not in text
    ]
    starters = [
        path
        for path in TESTS.rglob("test_*.py")
        if ".send_signal(" in (text := path.read_text(encoding="utf-8"))
        and "subprocess.Popen(" in text
    ]
    # code of a child that signals itself, in a string
    killing_themselves = [
        path
        for path in TESTS.rglob("test_*.py")
        if '"    os.kill(os.getpid()' in (text := path.read_text(encoding="utf-8"))
        and "signalled.run(" not in text
    ]
    assert [path for path in killing_themselves if path != Path(__file__)] == []
    assert senders == []
    assert [path for path in starters if path != Path(__file__)] == []
