"""Every kernel inside a CUDA graph of many launches, against a copy, PyTorch and torch.compile."""

from __future__ import annotations

import functools
import os
import statistics
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
LEAST_S = 12.0  # seconds that must be left for another case
HOST_CALLS, HOST_ROUNDS = 200, 7
EXPECTED_HOST_US = {"denoise_step": 43, "group_norm_silu split": 101}  # by simulation


def run(context: Context) -> None:
    """Host costs, then the cases in the order of their weight until time is short."""
    clock = Clock(context)
    _note_large_copy(context, clock)
    _note_host_costs(context, clock)
    cases = list(kernel_cases.cases(context.device))
    if not context.stands_in:
        _compile_all(context, [case.name for case in cases])
    for case in cases:
        if context.seconds_left < LEAST_S:
            context.note(case.name, "left out: no time was left")
            continue
        try:
            context.note(case.name, _measured(context, clock, case))
        except Exception as error:  # of whatever candidate: the others are still to be seen
            context.note(case.name, f"failed: {described(error)}")
            context.expect(False, f"{case.name}: {described(error)}")


def _measured(context: Context, clock: Clock, case: KernelCase) -> dict[str, Any]:
    """Verified and timed: microseconds of a launch, GB/s of the bytes it has to move."""
    runs: dict[str, Run] = {"ours": case.ours, "native": case.native}
    if context.sized(True, False):
        torch.compiler.reset()
        runs["compile"] = torch.compile(case.native, dynamic=False)
    facts: dict[str, Any] = {}
    able: dict[str, Run] = {}
    first = case.make()
    for name, candidate in runs.items():
        try:
            with torch.no_grad():
                error = _error(case, name, candidate(first), first)
        except Exception as raised:  # one of them; the others go on
            facts[name] = {"failed": described(raised)}
            context.expect(name != "ours", f"{case.name}: ours: {described(raised)}")
            continue
        facts[name] = {"error": error}
        right = error is not None and error <= kernel_cases.TOLERANCE[case.dtype]
        text = f"{case.name}: {name} is off by {error}"
        if context.expect(right or name != "ours", text) and right:
            able[name] = candidate
    sets = max(2, min(MOST_LAUNCHES, -(-2 * cache_bytes(context) // case.nbytes)))
    sets = context.sized(sets, 2)
    count = max(sets, context.sized(LAUNCHES, 3))
    buffers = [case.make() for _ in range(sets)]
    graphs: dict[str, Call] = {"copy": _copies(context, case, sets, count)}
    for name, candidate in able.items():
        launches = functools.partial(_launches, candidate, buffers, count)
        try:
            graphs[name] = captured(context, launches)
        except Exception as raised:
            facts[name]["failed"] = described(raised)
    times = clock.alternate(graphs, context.sized(ROUNDS, 2), SECONDS, device_only=True)
    copy = times["copy"]
    for name, found in times.items():
        facts.setdefault(name, {}).update(_rates(found, case.nbytes, count))
        if name != "copy":
            facts[name]["of_copy"] = ratio(copy, found)
    facts |= {f"{name}_over_ours": _over(times, name) for name in ("native", "compile")}
    return facts | {"launches": count, "buffers": sets}


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
    return captured(context, functools.partial(_launches, _copied, sources, count))


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


def _rates(times: Times, nbytes: int, count: int) -> dict[str, Any]:
    if times.failed or not times.device:
        return {"failed": times.failed}
    seconds = statistics.median(times.device) / count
    return {"us": rounded(1e6 * seconds), "GB/s": rounded(nbytes / seconds / 1e9)}


def _over(times: Mapping[str, Times], name: str) -> float | None:
    return ratio(times[name], times["ours"]) if {name, "ours"} <= times.keys() else None


def _note_large_copy(context: Context, clock: Clock) -> None:
    size = context.sized(COPIED, 1 << 12)
    source = torch.zeros(size // 4, dtype=torch.int32, device=context.device)
    out = torch.empty_like(source)
    ways = {"neg": lambda: torch.neg(source, out=out), "copy_": lambda: out.copy_(source)}
    times = clock.alternate(ways, context.sized(ROUNDS, 2), SECONDS, device_only=True)
    found = {name: _rates(t, 2 * size, 1).get("GB/s") for name, t in times.items()}
    context.note("large copy GB/s", found)


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
    jobs = [(str(context.device), names[first::workers]) for first in range(workers)]
    failed: list[str] = []
    try:
        # on leaving, workers that still compile are ended
        with get_context("spawn").Pool(workers) as pool:
            for found in pool.starmap_async(compile_cases, jobs, chunksize=1).get(AHEAD_S):
                failed += found
    except Exception as error:  # the cases compile for themselves then
        failed.append(described(error))
    elapsed = context.limit_s - context.seconds_left
    context.note("compiled ahead", {"processes": workers, "s": rounded(elapsed), "failed": failed})


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
    75.0,
    run,
    "Every kernel in a CUDA graph of many launches over buffers larger than the cache, in GB/s and "
    "shares of a copy, against PyTorch's operators and torch.compile; the host's cost of a call.",
)
