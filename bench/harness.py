"""Verify, then time: the part that the benchmarks of the ops share.

A case is an op at one shape, dtype and layout, with the candidates that do the same work. A case
whose result is wrong is never timed. Candidates take turns in one run, so that whatever else the
machine does meets them all; each turn is a block of calls over rotating buffers, so that a cache
does not serve the same tensor again and again. What is reported is the median over the blocks.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stepfuse.bench.able import able
from stepfuse.engine.files.writing import check_file, write_file
from stepfuse.kernels.limits import check_threads

OURS = "stepfuse"
INTO = "out="  # ours, into a buffer that is there already
COPY = "copy"
COMPILE = "compile"
BESIDE = "stepfuse beside compile"
ROTATED_BYTES = 128 << 20  # larger than a last-level cache that one process may count on
MOST_BUFFERS = 32
BLOCK_SECONDS = 0.004
# torch.compile brings an OpenMP of its own: threads of one pool spin for some milliseconds after
# their last work, on cores that the other pool is then timed on. So it is timed apart from the
# others, against ours once more, with a pause before each turn.
SETTLE_SECONDS = 0.02
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

Inputs = dict[str, Any]


@dataclass
class Case:
    """One op at one size.

    Args:
        label: the shape and what model has it.
        make: draws one set of inputs.
        candidates: name -> the work, given a set of inputs; "stepfuse" is ours and returns a new
            tensor, as the others do; "out=" is ours and writes inputs["buffer"], as a copy does.
        traffic: bytes that have to move through memory, each input and output once.
        verify: raises AssertionError where "stepfuse" does not agree with the reference.
        compiled: an expression to be timed under torch.compile too, as "compile".
    """

    label: str
    dtype: torch.dtype
    make: Callable[[], Inputs]
    candidates: dict[str, Callable[[Inputs], Any]]
    traffic: int
    verify: Callable[[], None]
    compiled: Callable[[Inputs], Any] | None = None
    note: str = ""

    def __str__(self) -> str:
        return f"{self.label} {DTYPES[self.dtype]} {self.note}".strip()


@dataclass
class Result:
    """Seconds a call, for each block of each candidate."""

    case: Case
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, name: str) -> float | None:
        """How many times longer ``name`` takes than ours; None where it was not timed."""
        base = BESIDE if name == COMPILE else OURS
        there = name in self.samples and base in self.samples
        return self.median(name) / self.median(base) if there else None


def measure(case: Case, rounds: int, with_compile: bool, hot: bool = False) -> Result:
    """Time every candidate of a case that is correct; torch.compile afterwards, beside ours.

    ``hot`` gives every call the same inputs, which a cache then holds where they fit.
    """
    case.verify()
    buffers = [case.make()] if hot else rotating(case)
    candidates = dict(case.candidates) | {COPY: _copy(case.traffic)}
    result = Result(case, _alternated(candidates, buffers, rounds, settle=0))
    if with_compile and case.compiled is not None:
        torch._dynamo.reset()
        compiled = torch.compile(case.compiled, fullgraph=True, dynamic=False)
        pair = {BESIDE: case.candidates[OURS], COMPILE: compiled}
        result.samples |= _alternated(pair, buffers, rounds, SETTLE_SECONDS)
    return result


def rotating(case: Case) -> list[Inputs]:
    """Sets of inputs that together are larger than a cache."""
    first = case.make()
    held = sum(v.nbytes for v in first.values() if isinstance(v, Tensor))
    count = max(2, min(MOST_BUFFERS, ROTATED_BYTES // max(held, 1)))
    return [first, *(case.make() for _ in range(count - 1))]


def _alternated(
    candidates: dict[str, Callable[[Inputs], Any]],
    buffers: list[Inputs],
    rounds: int,
    settle: float,
) -> dict[str, list[float]]:
    with torch.no_grad():
        calls = able(
            {
                n: functools.partial(_calls_per_block, call, buffers)
                for n, call in candidates.items()
            }
        )
        samples: dict[str, list[float]] = {name: [] for name in calls}
        turn = itertools.cycle(buffers)
        for _ in range(rounds):
            for name in calls:
                call = candidates[name]
                chosen = list(itertools.islice(turn, calls[name]))
                if settle:
                    time.sleep(settle)
                    call(next(turn))  # wakes its own threads
                start = time.perf_counter()
                for inputs in chosen:
                    call(inputs)
                samples[name].append((time.perf_counter() - start) / len(chosen))
    return samples


def _copy(traffic: int) -> Callable[[Inputs], Any]:
    """A copy that reads and writes as many bytes as the op has to, over buffers of its own."""
    half = max(traffic // 2, 1)
    count = max(2, min(MOST_BUFFERS, ROTATED_BYTES // traffic))
    pairs = itertools.cycle(
        [(torch.ones(half, dtype=torch.uint8), torch.ones(half, dtype=torch.uint8))
         for _ in range(count)]
    )  # fmt: skip

    def copy(inputs: Inputs) -> Tensor:
        source, target = next(pairs)
        return target.copy_(source)

    return copy


def _calls_per_block(call: Callable[[Inputs], Any], buffers: list[Inputs]) -> int:
    for inputs in buffers[:3]:
        call(inputs)
    start = time.perf_counter()
    for inputs in buffers[:3]:
        call(inputs)
    each = (time.perf_counter() - start) / min(3, len(buffers))
    return max(1, min(2000, int(BLOCK_SECONDS / each)))


def assert_close(found: Tensor, exact: Tensor, absolute: float, what: str) -> None:
    """``found`` is within ``absolute`` of ``exact``, beyond the rounding of its dtype."""
    rounding = torch.finfo(found.dtype).eps / 2 * exact.double().abs()
    worst = float(((found.double() - exact.double()).abs() - rounding).max())
    assert worst <= absolute, f"{what}: off by {worst:.3g}, allowed {absolute:.3g}: not timed"


def assert_near(found: Tensor, exact: Tensor, relative: float, what: str) -> None:
    """The L2 distance of ``found`` from ``exact`` is within ``relative`` of the norm of ``exact``.

    For sums of many terms, of which single ones may cancel.
    """
    error = float((found.double() - exact).norm() / exact.norm())
    assert error <= relative, f"{what}: off by {error:.3g}, allowed {relative:.3g}: not timed"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    try:
        from stepfuse.kernels.cpp import module

        isa = module.isa
    except ImportError:
        isa = "not built"
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": isa,
    }


def run(title: str, cases: Iterable[Case], columns: dict[str, str]) -> None:
    """The command line of a benchmark: measure the cases, print the table, keep the samples.

    ``columns`` maps candidates to the heading under which their ratio to ours is printed.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--rounds", type=int, default=21, help="blocks a candidate (default 21)")
    parser.add_argument("--threads", type=int, help="threads of torch and of ours")
    parser.add_argument("--match", default="", help="only cases whose label contains this")
    parser.add_argument(
        "--hot",
        action="store_true",
        help="the same tensors again and again, as a layer finds what the one before just wrote",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    try:
        check_threads("--threads", options.threads)
        if options.json:
            check_file(options.json)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has no width of its own
    with console.status("") as status:
        for case in cases:
            if options.match in str(case):
                status.update(str(case))
                work = functools.partial(
                    measure, case, options.rounds, not options.no_compile, options.hot
                )
                measured = able({str(case): work}).values()
                results += [r for r in measured if {OURS, INTO, COPY} <= r.samples.keys()]
    show(console, title, results, columns)
    if options.json:
        write_file(options.json, json.dumps(_as_json(results), indent=1).encode())


def show(console: Console, title: str, results: list[Result], columns: dict[str, str]) -> None:
    """Print medians and ratios; bandwidth is that of "out=", as a copy allocates nothing."""
    table = Table(title=title, caption=", ".join(f"{k} {v}" for k, v in machine().items()))
    table.add_column("case")
    table.add_column("dtype")
    table.add_column("us", justify="right")
    table.add_column("us out=", justify="right")
    table.add_column("GB/s", justify="right")
    table.add_column("% of copy", justify="right")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for result in results:
        case, seconds = result.case, result.median(INTO)
        table.add_row(
            f"{case.label} {case.note}".strip(),
            DTYPES[case.dtype],
            f"{result.median(OURS) * 1e6:.1f}",
            f"{seconds * 1e6:.1f}",
            f"{case.traffic / seconds / 1e9:.1f}",
            f"{100 * result.median(COPY) / seconds:.0f}",
            *(_times(result.ratio(name)) for name in columns),
        )
    table.add_section()
    medians = [
        statistics.median(ratios) if (ratios := _ratios(results, name)) else None
        for name in columns
    ]
    table.add_row("median over the cases", "", "", "", "", "", *map(_times, medians))
    console.print(table)


def _ratios(results: list[Result], name: str) -> list[float]:
    return [ratio for result in results if (ratio := result.ratio(name)) is not None]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def _as_json(results: list[Result]) -> dict[str, Any]:
    rows = [
        {
            "case": r.case.label,
            "note": r.case.note,
            "dtype": DTYPES[r.case.dtype],
            "traffic_bytes": r.case.traffic,
            "median_seconds": {name: r.median(name) for name in r.samples},
            "seconds": r.samples,
        }
        for r in results
    ]
    return {"machine": machine(), "rows": rows}
