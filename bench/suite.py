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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from stepfuse.bench import harness
from stepfuse.bench.harness import OURS
from stepfuse.bench.samples import ratio
from stepfuse.bench.significance import FEW
from stepfuse.bench.timing import Call, Turns, Work, undisturbed

LEAST_ROUNDS = FEW  # with less, the gate does not know how far they scatter


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
        """
        with torch.no_grad():
            turns = Turns(
                {OURS: Work(call, verify, calls=None), reference: Work(beside, calls=None)},
                say=pytest.skip,  # what cannot run here is named, and the others are timed
            )
            extra = self.benchmark.extra_info
            extra.update(turns.found[OURS] or {}, reference=reference, dtype=dtype)
            self.benchmark.group = group
            fitting = int(self.budget / sum(work.lasts for work in turns.works.values()))
            rounds = min(self.rounds, max(LEAST_ROUNDS, fitting))
            with undisturbed():
                self.benchmark.pedantic(
                    call,
                    teardown=lambda: turns.turn(reference),
                    rounds=rounds,
                    iterations=turns.works[OURS].calls,
                )
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        # where a block has several calls, pytest-benchmark makes one more for its result
        extra["reference_seconds"] = turns.seconds[reference][:rounds]
        extra["ratio"] = ratio(self.benchmark.stats.stats.data, extra["reference_seconds"])

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
            over(OURS),
            beside=over("eager"),
            reference="eager",
            dtype=harness.DTYPES[case.dtype],
            group=f"{op} {case.label}",
            verify=verify,
        )
