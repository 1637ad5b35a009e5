"""Candidates for one network: built, verified, weighed and timed in turn; all of it noted."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stepfuse.bench.able import described
from stepfuse.bench.gpu_check.check import Context
from stepfuse.bench.gpu_check.network_candidates import BASE, OURS, Evaluate, Workload
from stepfuse.bench.gpu_check.timing import Clock, ratio, relative_error, rounded

ROUNDS, SMALL_ROUNDS = 15, 2
# relative error to float32 over all outputs: rounding through some 60 layers. A candidate that is
# not the reference may be as far off as eager is, and half as much again
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-4}
SLACK = 1.5


def compare(
    context: Context, title: str, work: Workload, names: Iterable[str], limit_s: float
) -> dict[str, Evaluate]:
    """Note under ``title`` what each candidate gives, holds and takes; return those that are right.

    One that fails or is wrong is named and left out. The first of the names sets how far off the
    others may be.
    """
    facts: dict[str, dict[str, Any]] = {}
    exact = work.exact()
    allowed, able = TOLERANCE[work.x.dtype], {}
    for name in names:
        evaluate, facts[name] = _built(context, work, name, exact)
        error = facts[name].get("error")
        if error is not None and name == next(iter(facts)):
            allowed = max(allowed, SLACK * error)
        right = evaluate is not None and error is not None and error <= allowed
        if name in OURS:
            context.expect(right, f"{title}: {name}: {facts[name]}, allowed {allowed:.3g}")
        if right and evaluate is not None:
            able[name] = evaluate
        context.note(title, facts)
    clock = Clock(context)
    times = clock.alternate(able, context.sized(ROUNDS, SMALL_ROUNDS), limit_s)
    for name, found in times.items():
        facts[name] |= found.milliseconds()
        if found.failed:
            facts[name]["failed"] = found.failed
        for other in dict.fromkeys((BASE, OURS[0])):
            if other in times and other != name:
                facts[name][f"{other} / this"] = ratio(times[other], found)
                facts[name][f"{other} / this, wall"] = ratio(times[other], found, "wall")
    context.note(title, facts)
    return able


def _built(
    context: Context, work: Workload, name: str, exact: Tensor
) -> tuple[Evaluate | None, dict[str, Any]]:
    """A candidate with its error, its memory beside that of the others, and how long it took."""
    before, started = _memory(context, reset=True), time.perf_counter()
    try:
        evaluate = work.candidate(name)
        error = relative_error(evaluate(), exact)
    except Exception as raised:  # of whatever library: the others go on
        return None, {"failed": described(raised)}
    context.synchronize()
    facts: dict[str, Any] = {"built_s": rounded(time.perf_counter() - started)}
    facts["error"] = rounded(error) if error == error else None
    if before:
        after = _memory(context, reset=False)
        held, peak = (after[key] - before["held"] for key in ("held", "peak"))
        facts |= {"held_MB": rounded(held / 1e6), "peak_MB": rounded(peak / 1e6)}
        facts["call_peak_MB"] = rounded(_call_peak(context, evaluate) / 1e6)
    return evaluate, facts


def _call_peak(context: Context, evaluate: Evaluate) -> int:
    """Bytes that a call takes for a time; a replayed graph holds its own all the time."""
    before = _memory(context, reset=True)
    evaluate()
    return _memory(context, reset=False)["peak"] - before["held"]


def _memory(context: Context, reset: bool) -> dict[str, int]:
    """Bytes allocated now, and at most since the last reset; nothing is known on the stand-in."""
    if context.stands_in:
        return {}
    context.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats(context.device)
    return {
        "held": torch.cuda.memory_allocated(context.device),
        "peak": torch.cuda.max_memory_allocated(context.device),
    }
