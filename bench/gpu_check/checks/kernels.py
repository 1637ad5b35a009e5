"""Every kernel inside a CUDA graph of many launches, against a copy, PyTorch and torch.compile."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Mapping
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from stepfuse.bench.able import described
from stepfuse.bench.gpu_check import kernel_cases
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.kernel_cases import Inputs, KernelCase, Run
from stepfuse.bench.gpu_check.timing import (
    Call,
    Clock,
    Times,
    attempt,
    cache_bytes,
    captured,
    ratio,
    relative_error,
    rounded,
)

LAUNCHES, MOST_LAUNCHES = 100, 512  # of a graph: more where the buffers have to exceed the cache
ROUNDS, SECONDS = 9, 1.0
COPIED = 256 << 20  # bytes of the large copy
WORKERS, AHEAD_S = 14, 35.0  # processes that compile ahead, and the seconds they have at most
LEAST_S = 5.0  # seconds that must be left for another case
FIRST = ("ours us", "ours of copy", "native / ours", "compile / ours")  # of a row, to be read first
HOST_CALLS, HOST_ROUNDS = 200, 7
EXPECTED_HOST_US = {
    "denoise_step": 43,
    "group_norm_silu split": 101,
}  # of the design, without a GPU


def run(context: Context) -> None:
    """Host costs, then the cases in the order of their weight until time is short."""
    clock = Clock(context)
    _note_large_copy(context, clock)
    _note_host_costs(context, clock)
    cases = list(kernel_cases.cases(context.device))
    if not context.stands_in:
        _compile_all(context, [case.name for case in cases])
    rows: dict[str, dict[str, Any]] = {}
    for number, case in enumerate(cases):
        if context.seconds_left < LEAST_S:
            context.note("left out, no time was left", [case.name for case in cases[number:]])
            break
        try:
            rows[case.name] = _measured(context, clock, case)
        except Exception as error:  # of whatever candidate: the others are still to be seen
            rows[case.name] = {"failed": described(error)}
            context.expect(False, f"{case.name}: {described(error)}")
        context.note("kernels", rows)


def _measured(context: Context, clock: Clock, case: KernelCase) -> dict[str, Any]:
    """Verified and timed: microseconds of a launch, and GB/s of the bytes it has to move."""
    runs: dict[str, Run] = {"ours": case.ours, "native": case.native}
    if not context.stands_in:
        torch.compiler.reset()
        runs["compile"] = torch.compile(case.native, dynamic=False)
    row: dict[str, Any] = {}
    able = {name: run for name, run in runs.items() if _is_right(context, case, name, run, row)}
    sets = max(2, min(MOST_LAUNCHES, -(-2 * cache_bytes(context) // case.nbytes)))
    sets = context.sized(sets, 2)
    count = max(sets, context.sized(LAUNCHES, 3))
    buffers = [case.make() for _ in range(sets)]
    graphs: dict[str, Call] = {"copy": _copies(context, case, sets, count)}
    for name, candidate in able.items():
        launches = functools.partial(_launches, candidate, buffers, count)
        try:
            graphs[name] = captured(context, launches, warm_up=1)  # it has run already
        except Exception as raised:
            row[f"{name} failed"] = described(raised)
            context.expect(name != "ours", f"{case.name}: ours: {described(raised)}")
    times = clock.alternate(graphs, context.sized(ROUNDS, 2), SECONDS, device_only=True)
    for name, found in times.items():
        if found.failed or not found.device:
            row[f"{name} failed"] = found.failed
            continue
        seconds = statistics.median(found.device) / count
        row[f"{name} us"] = rounded(1e6 * seconds)
        row[f"{name} GB/s"] = rounded(case.nbytes / seconds / 1e9)
    for name in able:
        row[f"{name} of copy"] = _ratio(times, "copy", name)
    for name in ("native", "compile"):
        row[f"{name} / ours"] = _ratio(times, name, "ours")
    ordered = {name: row[name] for name in FIRST if row.get(name) is not None}
    return ordered | row | {"launches": count, "MB in turn": rounded(sets * case.nbytes / 1e6)}


def _is_right(
    context: Context, case: KernelCase, name: str, candidate: Run, row: dict[str, Any]
) -> bool:
    """Whether a candidate gives what it should; how far off it is goes into the row."""
    inputs = case.make()
    try:
        with torch.no_grad():
            error = _error(case, name, candidate(inputs), inputs)
    except Exception as raised:  # one of them; the others go on
        row[f"{name} failed"] = described(raised)
        context.expect(name != "ours", f"{case.name}: ours: {described(raised)}")
        return False
    row[f"{name} error"] = error
    right = error is not None and error <= kernel_cases.TOLERANCE[case.dtype]
    context.expect(right or name != "ours", f"{case.name}: ours is off by {error}")
    return right


def _launches(candidate: Run, buffers: list[Inputs], count: int) -> list[Any]:
    """So many launches over the buffers in turn; a result lives until its buffers' next turn."""
    results: list[Any] = [None] * len(buffers)
    with torch.no_grad():
        for i in range(count):
            results[i % len(buffers)] = candidate(buffers[i % len(buffers)])
    return results


def _copies(context: Context, case: KernelCase, sets: int, count: int) -> Call:
    """Launches that read half of the bytes and write half, by the simplest kernel there is."""
    kind = torch.int32 if case.dtype == "fp32" else torch.int16
    size = max(1, case.nbytes // 2 // kind.itemsize)
    sources = [{"x": torch.zeros(size, dtype=kind, device=context.device)} for _ in range(sets)]
    return captured(context, functools.partial(_launches, _copied, sources, count), warm_up=1)


def _copied(inputs: Inputs) -> Tensor:
    """A kernel that reads as much as it writes; `clone` may go another way than kernels do."""
    negated: Tensor = inputs["x"].neg()
    return negated


def _error(case: KernelCase, name: str, got: Any, inputs: Inputs) -> float | None:
    """Relative to float64, None where that is NaN; of noise of its own, whether it is finite."""
    if case.drawn and name != "ours":
        return 0.0 if bool(torch.isfinite(got).all()) else None
    error = relative_error(got, case.exact(inputs))
    return rounded(error) if error == error else None


def _ratio(times: Mapping[str, Times], slower: str, faster: str) -> float | None:
    return ratio(times[slower], times[faster]) if {slower, faster} <= times.keys() else None


def _note_large_copy(context: Context, clock: Clock) -> None:
    size = context.sized(COPIED, 1 << 12)
    source = torch.zeros(size // 4, dtype=torch.int32, device=context.device)
    out = torch.empty_like(source)
    ways = {"neg": lambda: torch.neg(source, out=out), "copy_": lambda: out.copy_(source)}
    times = clock.alternate(ways, context.sized(ROUNDS, 2), SECONDS, device_only=True)
    found = {name: 2 * size / statistics.median(t.device) for name, t in times.items() if t.device}
    context.note("large copy GB/s", {name: rounded(speed / 1e9) for name, speed in found.items()})


def _note_host_costs(context: Context, clock: Clock) -> None:
    """Microseconds until an un-captured call returns: launches are waited for outside."""
    dtype = context.sized("fp16", "fp32")
    images = context.sized(kernel_cases.IMAGES, kernel_cases.TINY_IMAGES)
    latents = context.sized(kernel_cases.LATENTS, kernel_cases.TINY_LATENTS)["small"]
    split = kernel_cases.group_norm(context.device, images[0], dtype, "NHWC")
    whole = kernel_cases.group_norm(context.device, images[-1], dtype, "NHWC")
    step = kernel_cases.stepping(context.device, latents, dtype, "ddim")
    runs = {"denoise_step": step, "group_norm_silu split": split, "group_norm_silu whole": whole}
    facts: dict[str, Any] = {}
    for name, case in runs.items():
        inputs = case.make()
        for who, candidate in (("ours", case.ours), ("native", case.native)):
            call = functools.partial(candidate, inputs)
            measure = functools.partial(_host_us, context, clock, call)
            found = attempt(context, f"host us {name} {who}", measure)
            if found is not None:
                facts.setdefault(name, {})[who] = found
        facts.setdefault(name, {})["expected"] = EXPECTED_HOST_US.get(name)
    context.note("host us of an un-captured call", facts)


def _host_us(context: Context, clock: Clock, call: Call) -> float:
    count = context.sized(HOST_CALLS, 3)

    def block() -> None:
        with torch.no_grad():
            for _ in range(count):
                call()

    block()
    return rounded(
        1e6 * statistics.median(clock.host(block)[0] / count for _ in range(HOST_ROUNDS))
    )


def _compile_all(context: Context, names: list[str]) -> None:
    """Fill the compilers' caches on disk from several processes, each on a part of the cases."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read where Inductor is first imported
    workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1))
    started = time.perf_counter()
    jobs = [(str(context.device), names[first::workers]) for first in range(workers)]
    failed: list[str] = []
    try:
        # on leaving, workers that still compile are ended
        with get_context("spawn").Pool(workers) as pool:
            for found in pool.starmap_async(compile_cases, jobs, chunksize=1).get(AHEAD_S):
                failed += found
    except Exception as error:  # the cases compile for themselves then
        failed.append(described(error))
    seconds = rounded(time.perf_counter() - started)
    context.note("compiled ahead", {"processes": workers, "s": seconds, "failed": failed})


def compile_cases(device: str, names: list[str]) -> list[str]:
    """Run these cases once, as they are and compiled; what failed, in words."""
    torch.set_grad_enabled(False)
    wanted, failed = set(names), []
    for case in kernel_cases.cases(torch.device(device)):
        if case.name in wanted:
            try:
                inputs = case.make()
                case.ours(inputs)
                torch.compiler.reset()
                torch.compile(case.native, dynamic=False)(inputs)
            except Exception as error:  # told where the case is measured, too
                failed.append(f"{case.name}: {described(error)}")
    return failed


CHECK = Check(
    "kernels",
    "speed",
    90.0,
    run,
    "Every kernel in a CUDA graph of many launches over buffers larger than the cache, in GB/s and "
    "shares of a copy, against PyTorch's operators and torch.compile; the host's cost of a call.",
)
