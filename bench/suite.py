"""Verify, then time in turn with a reference: what the suites under pytest-benchmark share.

    python -m pytest bench --benchmark-only [--rounds 21] [--benchmark-json FILE] [-k digits]

A benchmark whose result is wrong fails and is never timed. Each round times a block of calls and,
right after it, a block of a reference that does the same work without us, so that whatever else
the machine does meets both. The file of pytest-benchmark then holds the seconds of every round, and
beside them those of the reference: `python -m stepfuse.bench.gate` compares their ratios between
two files, never their times.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from stepfuse.bench import harness
from stepfuse.bench.able import described

Call = Callable[[], Any]
LEAST_ROUNDS = 5


@dataclass
class Timed:
    """The fixture ``timed``.

    Args:
        benchmark: the fixture of pytest-benchmark.
        rounds: blocks of calls, for the call and for its reference.
        budget: seconds for all blocks: calls that take long get fewer rounds, but not under
            `LEAST_ROUNDS`.
    """

    benchmark: Any
    rounds: int = 21
    budget: float = 15.0

    def __call__(
        self,
        call: Call,
        *,
        beside: Call,
        reference: str,
        dtype: str,
        group: str,
        verify: Callable[[], Any],
        settle: float = 0.0,
    ) -> None:
        """Time ``call`` once ``verify`` has returned, each round followed by ``beside``.

        Args:
            call: the work.
            beside: the same work by the reference.
            reference: what the reference is called in the file.
            dtype: of the work.
            group: benchmarks of one group stand in one table.
            verify: raises AssertionError where the result of ``call`` is wrong; what it returns,
                a dict of figures or None, is kept beside the times. Whatever else it raises is the
                reason why the benchmark is left out (skipped): it cannot run here.
            settle: seconds to wait before a block, for threads of the other side to fall asleep.
        """
        try:
            found = verify()
        except AssertionError:
            raise
        except Exception as error:  # what cannot run here is named, and the others are timed
            pytest.skip(f"left out: {described(error)}")
        extra = self.benchmark.extra_info
        extra.update(found or {}, reference=reference, dtype=dtype)
        self.benchmark.group = group
        with torch.no_grad():
            (own, first), (other, second) = _calls(call), _calls(beside)
            fitting = int(self.budget / (first + second))
            rounds = min(self.rounds, max(LEAST_ROUNDS, fitting))
            seconds: list[float] = []

            def turn() -> None:
                seconds.append(_block(beside, other, settle))
                _settled(call, settle)

            _settled(call, settle)
            self.benchmark.pedantic(call, teardown=turn, rounds=rounds, iterations=own)
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        # where a block has several calls, pytest-benchmark makes one more for its result
        extra["reference_seconds"] = seconds[:rounds]
        pairs = zip(self.benchmark.stats.stats.data, seconds, strict=False)
        extra["ratio"] = statistics.median(a / b for a, b in pairs)

    def case(self, case: harness.Case) -> None:
        """One op at one shape over rotating buffers, beside the eager expression."""
        op = self.benchmark.name.partition("[")[0].removeprefix("test_")

        def over(name: str) -> Call:
            turn = itertools.cycle(buffers)
            work = case.candidates[name]
            return lambda: work(next(turn))

        def verify() -> dict[str, Any]:
            case.verify()
            return {"case": str(case), "traffic_bytes": case.traffic}

        buffers = harness.rotating(case)
        self(
            over(harness.OURS),
            beside=over("eager"),
            reference="eager",
            dtype=harness.DTYPES[case.dtype],
            group=f"{op} {case.label}",
            verify=verify,
        )


def _calls(call: Call) -> tuple[int, float]:
    """How many calls make a block, and about how many seconds they take."""
    call()
    each = max(_block(call, 1, 0.0), 1e-9)
    count = max(1, min(2000, round(harness.BLOCK_SECONDS / each)))
    return count, count * each


def _settled(call: Call, settle: float) -> None:
    """Wait, then wake the threads that ``call`` uses."""
    if settle:
        time.sleep(settle)
        call()


def _block(call: Call, count: int, settle: float) -> float:
    """Seconds a call, over ``count`` of them."""
    _settled(call, settle)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
