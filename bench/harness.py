"""What the benchmarks of the ops share: a case, its table, and its command line.

A case is an op at one shape, dtype and layout, with the candidates that do the same work. They are
verified and timed as `stepfuse.bench.timing` says, a turn being a block of calls over rotating
buffers. On a GPU a block is one CUDA graph of many calls, for all alike, as a captured step has
them: launched one by one, the host would be timed.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stepfuse.bench import cuda_graph, machine, script, timing
from stepfuse.bench.able import able
from stepfuse.bench.samples import ratio
from stepfuse.bench.tf32 import tf32_off
from stepfuse.bench.timing import Turns, Work
from stepfuse.kernels.backends import BackendUnavailable

OURS = "stepfuse"
INTO = "out="  # ours, into a buffer that is there already
COPY = "copy"
COMPILE = "compile"
BESIDE = "stepfuse beside compile"
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
    device: str = "cpu"

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
        return ratio(self.samples[name], self.samples[base]) if there else None


def measure(case: Case, rounds: int, with_compile: bool, hot: bool = False) -> Result:
    """Time every candidate of a case that is correct; torch.compile afterwards, beside ours.

    ``hot`` gives every call the same inputs, which a cache then holds where they fit.
    """
    device = torch.device(case.device)
    on_gpu = device.type == "cuda"
    timer, uncounted = timing.timer_for(device)
    turns = functools.partial(Turns, timer=timer, uncounted=uncounted)
    buffers = [case.make()] if hot else rotating(case)
    inputs = itertools.cycle([(buffer,) for buffer in buffers])
    work: Callable[..., Work] = functools.partial(
        cuda_graph.Graphed if on_gpu else Work, calls=None, inputs=inputs
    )
    works = {name: work(call) for name, call in case.candidates.items()}
    works[OURS].verify = case.verify
    with torch.no_grad(), tf32_off(device), _current(device):
        copy = work(_copy(case.traffic, device))
        result = Result(case, turns(works | {COPY: copy}).run(rounds).seconds)
        if with_compile and case.compiled is not None:
            torch.compiler.reset()
            # the graph is ours, as for the others; the search for kernels is that of max-autotune
            mode = "max-autotune-no-cudagraphs" if on_gpu else None
            compiled = torch.compile(case.compiled, fullgraph=True, dynamic=False, mode=mode)
            pair = {BESIDE: work(case.candidates[OURS]), COMPILE: work(compiled)}
            # torch.compile brings an OpenMP of its own: timed apart, with pauses
            result.samples |= turns(pair, settle=not on_gpu).run(rounds).seconds
    return result


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, the device is the current one of CUDA."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rotating(case: Case) -> list[Inputs]:
    """Sets of inputs that together are larger than a cache."""
    held = sum(v.nbytes for v in case.make().values() if isinstance(v, Tensor))
    found = timing.rotating(case.make, max(held, 1))
    for inputs in found:
        if "buffer" in inputs:
            inputs["buffer"].zero_()  # so that its pages are there, as those of a copy's target
    return found


def _copy(traffic: int, device: torch.device) -> Callable[[Inputs], Any]:
    """A copy that reads and writes as many bytes as the op has to, over buffers of its own."""
    half = torch.ones(max(traffic // 2, 1), dtype=torch.uint8, device=device)
    pairs = itertools.cycle(timing.rotating(lambda: (half.clone(), half.clone()), traffic))

    def copy(inputs: Inputs) -> Tensor:
        source, target = next(pairs)
        return target.copy_(source)

    return copy


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


def run(
    title: str,
    cases: Callable[[str], Iterable[Case]],
    columns: dict[str, str],
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> None:
    """The command line of a benchmark: measure the cases, print the table, keep the samples.

    ``cases`` makes those of a device, ``columns`` maps candidates to the heading under which their
    ratio to ours is printed, ``devices`` are the types of device that the op has a kernel for.
    """
    parser = script.parser(title, rounds=21)
    parser.add_argument("--match", default="", help="only cases whose label contains this")
    parser.add_argument(
        "--hot",
        action="store_true",
        help="the same tensors again and again, as a layer finds what the one before just wrote",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--device", default="cpu", help=f"where to run: one of {', '.join(devices)} (default cpu)"
    )
    options = script.parsed(parser)
    try:
        check_device(options.device, devices)
    except (ValueError, BackendUnavailable) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    results = []
    console = script.console()
    with console.status("") as status:
        for case in cases(options.device):
            if options.match in str(case):
                status.update(str(case))
                work = functools.partial(
                    measure, case, options.rounds, not options.no_compile, options.hot
                )
                measured = able({str(case): work}).values()
                results += [r for r in measured if {OURS, INTO, COPY} <= r.samples.keys()]
    show(console, title, results, columns)
    on = machine.brief() | ({} if options.device == "cpu" else {"device": options.device})
    script.save(options.json, {"machine": on, "rows": list(map(_row, results))})


def check_device(name: str, devices: tuple[str, ...]) -> None:
    """Raise ValueError for a device that the op has no kernel for, or BackendUnavailable."""
    kind = name.partition(":")[0]
    if kind not in devices:
        raise ValueError(f"--device must be one of {', '.join(devices)}; got {name!r}")
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be like cuda or cuda:1; got {name!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"--device {name} needs a GPU, and PyTorch sees none here")


def show(console: Console, title: str, results: list[Result], columns: dict[str, str]) -> None:
    """Print medians and ratios; bandwidth is that of "out=", as a copy allocates nothing."""
    table = Table(title=title, caption=machine.caption())
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
            f"{100 * ratio(result.samples[COPY], result.samples[INTO]):.0f}",
            *(_times(result.ratio(name)) for name in columns),
        )
    table.add_section()
    by_column = [[found for r in results if (found := r.ratio(name))] for name in columns]
    medians = [statistics.median(ratios) if ratios else None for ratios in by_column]
    table.add_row("median over the cases", "", "", "", "", "", *map(_times, medians))
    console.print(table)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def _row(result: Result) -> dict[str, Any]:
    return {
        "case": result.case.label,
        "note": result.case.note,
        "dtype": DTYPES[result.case.dtype],
        "traffic_bytes": result.case.traffic,
        "median_seconds": {name: result.median(name) for name in result.samples},
        "seconds": result.samples,
    }
