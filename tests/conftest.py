"""What every test relies on: importable peers, few threads, and the same random numbers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# a thread that spins at a barrier while another process has its core makes small operations slower
# by orders of magnitude; read when torch loads OpenMP, in the processes that tests start too
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.append(str(Path(__file__).parent.parent))  # for bench.*; last, so that it shadows nothing

from stepfuse.bench import peers_setup

peers_setup.prepare()
# more threads than cores make small operations slower by orders of magnitude
torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0)), 4))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt here, whatever the parent of this process chose."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same generator state and leaves the thread count as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
