"""A U-Net of Stable Diffusion 1.5's shape: eager, captured, compiled and ours, in turn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from stepfuse.bench.gpu_check import capped
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.device_profile import breakdown
from stepfuse.bench.gpu_check.network_candidates import BASE, OURS, Workload, makes_graphs
from stepfuse.bench.gpu_check.network_compare import compare
from stepfuse.bench.gpu_check.timing import attempt, rounded, tf32_flags
from stepfuse.bench.tf32 import tf32

CHILD = "stepfuse.bench.gpu_check.network_child"
BATCHES, TINY_BATCHES = (2, 16), (1, 2)
SECONDS = 6.0  # of timing a batch size
MARGIN_S = 3.0  # before this check itself is killed
LEAST_S = 15.0  # below which no child is started
CAP_S = {"compile reduce-overhead": 90.0, "cudnn.benchmark": 30.0, "compile max-autotune": 90.0}
BFLOAT16_S = 45.0  # for bfloat16, where what comes last has its own beside it
FIRST = ("eager NCHW", "eager NHWC", BASE, "ours", "ours graph")


def run(context: Context) -> None:
    """float16 in both batch sizes with breakdowns, then the children, max-autotune last."""
    first, second = context.sized(BATCHES, TINY_BATCHES)
    dtype = context.sized(torch.float16, torch.float32)
    names = [*FIRST, "eager NCHW graph", *([OURS[2]] if makes_graphs() else [])]
    with torch.no_grad(), tf32(False):
        flags = {"tf32": tf32_flags(), "cudnn.benchmark": torch.backends.cudnn.benchmark}
        context.note("flags", flags)
        work = attempt(context, "network", functools.partial(Workload.of, context, first, dtype))
        if work is None:
            context.expect(False, f"the network could not be built: {context.facts['network']}")
            return
        parameters = sum(p.numel() for p in work.model.parameters())
        context.note("network", {"parameters": parameters, "x": list(work.x.shape)})
        _at_home(context, work, names)
        _passes(context, work)
        _at_home(context, work.of_batch(second), names)
        _child(context, "compile reduce-overhead", dtype, [first, second])
        _child(context, "cudnn.benchmark", dtype, [first])
        if context.seconds_left > CAP_S["compile max-autotune"] + BFLOAT16_S:
            del work
            _at_home(context, Workload.of(context, first, torch.bfloat16), FIRST)
        _child(context, "compile max-autotune", dtype, [first])


def _at_home(context: Context, work: Workload, names: Sequence[str]) -> None:
    """Compare in this process, and take ours and eager to pieces."""
    title = f"{_short(work.x.dtype)} batch {len(work.x)}"
    compared = functools.partial(compare, context, title, work, names, SECONDS)
    able = attempt(context, f"{title}, as a whole", compared)
    if context.expect(able is not None, f"{title} could not be compared") and able:
        # a replayed graph has the kernels of the same calls one by one
        ours = OURS[0] if OURS[0] in able else OURS[1]
        for name in (ours, "eager NHWC"):
            if name in able:
                profiled = functools.partial(breakdown, context, able[name])
                found = attempt(context, f"{title}: {name}, kernels", profiled)
                for what, table in (found or {}).items():
                    context.note(f"{title}: {name}, kernels {what}", table)
        able.clear()
    _free(context)


def _passes(context: Context, work: Workload) -> None:
    """Which passes matched, and that the network was traced at all."""
    text = attempt(context, "passes", lambda: work.optimized().explain())
    work.own = None
    if text is not None:
        parts = [line.split(maxsplit=1) for line in text.splitlines() if line]
        context.note("passes", {name: " ".join(rest) for name, *rest in parts})
        context.expect("remove_no_ops" in text, f"the network was not traced: {text}")
    _free(context)


def _child(context: Context, name: str, dtype: torch.dtype, batches: list[int]) -> None:
    """Candidates that compile for long, or with other flags, in a process that may be ended."""
    cap_s = min(CAP_S[name], context.seconds_left - MARGIN_S)
    if cap_s < LEAST_S:
        context.note(name, "left out: no time was left")
        return
    tuned = name == "cudnn.benchmark"
    job: dict[str, Any] = {
        "device": str(context.device),
        "dtype": str(dtype).removeprefix("torch."),
        "batches": batches,
        "names": [BASE, OURS[0] if tuned else context.sized(name, "eager NCHW")],
        "tuned": tuned,
        "limit_s": cap_s,
    }
    before = context.seconds_left
    found = attempt(context, name, lambda: capped.ask(CHILD, job, cap_s))
    if found is None:
        return
    for wrong in found.pop("wrong"):
        context.expect(False, f"{name}: {wrong}")
    for title, facts in found.pop("facts").items():
        context.note(f"{name}: {title}", facts)
    context.note(name, {**found, "s": rounded(before - context.seconds_left)})


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")


def _free(context: Context) -> None:
    if not context.stands_in:
        torch.cuda.empty_cache()


CHECK = Check(
    "network",
    "speed",
    240.0,
    run,
    "A U-Net of Stable Diffusion 1.5's shape, eager, captured, under torch.compile and ours: "
    "errors, times and memory of each, and the device's time by kind of kernel.",
)
