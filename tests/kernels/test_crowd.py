"""Loops beside other processes' work: other threads, a while asleep, the same results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest
import torch

import stepfuse as sf
from stepfuse.bench.neighbours import neighbours

pytest.importorskip("stepfuse.kernels.cpp.module", reason="the C++ module was not built")

SECONDS = 1.5


@pytest.fixture(autouse=True)
def threads_on_every_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, len(os.sched_getaffinity(0))))
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")
def test_results_beside_busy_neighbours_are_those_of_a_quiet_machine() -> None:
    network = sf.load("digits").model
    # two in turns: what a part of a loop left out would be the other's
    batches = [
        (torch.randn(2, 1, 32, 32), torch.tensor([3, 900]), torch.tensor([1, 10])) for _ in range(2)
    ]
    fast = sf.optimize(network, batches[0])
    with torch.no_grad():
        quiet = [fast(*batch) for batch in batches]
        assert not torch.equal(*quiet)
        threads = len(os.listdir("/proc/self/task"))
        evaluations = 0
        with neighbours(2 * torch.get_num_threads()):
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                for batch, result in zip(batches, quiet, strict=True):
                    assert torch.equal(fast(*batch), result)
                evaluations += 1
        assert evaluations
    # those that were added are gone when their time is over
    end = time.monotonic() + 60
    while len(os.listdir("/proc/self/task")) > threads:
        assert time.monotonic() < end
        time.sleep(0.05)
