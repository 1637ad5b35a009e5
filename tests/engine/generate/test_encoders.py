"""Processes that encode beside the sampler: the same bytes, whatever becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.children import children, runs
from tests.engine.generate import case

from stepfuse.engine.generate import crew
from stepfuse.engine.generate.encoders import EncoderGone, Encoders
from stepfuse.engine.generate.formats import choose
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.work import forget, run_shard, todo


@pytest.fixture
def two() -> Iterator[Encoders]:
    encoders = Encoders(choose("webdataset"), 2)
    yield encoders
    encoders.end()


def _images(count: int, size: int = 200) -> list[Made]:
    drawn = np.random.default_rng(0).integers(0, 255, (count, size, size, 3), np.uint8)
    return [Made(n, pixels, n % 3) for n, pixels in enumerate(drawn)]


def test_a_job_has_the_bytes_that_it_has_without_them(tmp_path: Path) -> None:
    expected = case.make_all(case.new_job(tmp_path / "alone"))
    job = case.new_job(tmp_path / "run")
    for k in todo(job):
        run_shard(job, k, encoders=2)
    forget()
    assert case.hashes(job) == expected
    assert len(expected) == 3


def test_images_come_in_order(two: Encoders) -> None:
    """Of more chunks than there are processes, the last one not full, and of none."""
    format = choose("webdataset")
    images = _images(11)
    assert sum(image.pixels.nbytes for image in images) > 4 * (1 << 18)
    found = list(two.encoded(iter(images)))
    assert [(made.n, content) for made, content in found] == [
        (made.n, format.encode(made)) for made in images
    ]
    assert list(two.encoded(iter(()))) == []


def test_an_error_is_raised_here_and_the_next_question_gets_its_own_answer(two: Encoders) -> None:
    images = _images(9)
    wrong = [*images[:3], Made(3, np.zeros((4, 4), np.float64)), *images[4:]]
    with pytest.raises(TypeError, match="image 3"):
        list(two.encoded(iter(wrong)))
    stopped = two.encoded(iter(images))
    next(stopped)
    stopped.close()
    assert [made.n for made, _ in two.encoded(iter(images))] == list(range(9))


def test_a_killed_one_fails_the_shard_and_another_takes_its_place(tmp_path: Path) -> None:
    expected = case.make_all(case.new_job(tmp_path / "alone"))
    job = case.new_job(tmp_path / "run")
    run_shard(job, 0, encoders=1)
    for child in children(os.getpid()):
        os.kill(child, signal.SIGKILL)
    with pytest.raises(EncoderGone, match="killed by SIGKILL"):
        run_shard(job, 1, encoders=1)
    assert todo(job) == [1, 2]
    for k in todo(job):
        run_shard(job, k, encoders=1)
    forget()
    assert case.hashes(job) == expected
    assert children(os.getpid()) == []


_WORKER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from stepfuse.engine.generate.job import open_job
from stepfuse.engine.generate.work import run_shard
run_shard(open_job({folder!r}), 0, encoders=2)
print("made", flush=True)
signal.pause()
"""


def test_they_end_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    case.new_job(tmp_path / "run")
    script = _WORKER.format(root=str(case.ROOT), folder=str(tmp_path / "run"))
    worker = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=case.environment(), text=True
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "made\n"
    started = children(worker.pid)
    worker.kill()
    worker.wait()
    assert len(started) == 2
    end = time.monotonic() + 20
    while any(map(runs, started)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(runs, started))


def test_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """None beside a network on the CPU; on a GPU the cores that fall to it, less one."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(crew, "usable_cores", lambda: 16)
    assert crew.choose_encoders(torch.device("cpu")) == 0
    for gpus, count in ((1, 8), (4, 3), (16, 0)):
        monkeypatch.setattr(crew, "_gpus", lambda gpus=gpus: ["cuda"] * gpus)
        assert crew.choose_encoders(gpu) == count
