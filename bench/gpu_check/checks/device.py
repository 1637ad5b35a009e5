"""What the device is, how it is set, and how fast it copies and multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from stepfuse.bench.cuda_timing import l2_bytes
from stepfuse.bench.gpu_check import host
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.parts import each
from stepfuse.kernels.backends import FLOAT_DTYPES, why_not

PACKAGES = ("torch", "triton", "numpy", "safetensors", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
STATE = (
    "power.draw", "power.limit", "temperature.gpu", "utilization.gpu", "memory.used",
    "persistence_mode", "mig.mode.current", "ecc.mode.current",
)  # fmt: skip
TURNS = 5  # of which the fastest counts


def run(context: Context) -> None:
    """The facts first, then a copy and a product."""
    each(
        context,
        {
            "facts": lambda: _facts(context),
            "clocks": lambda: _clocks(context),
            "copy": lambda: _copy(context),
            "product": lambda: _product(context),
            "clocks after work": lambda: _clocks(context, "clocks after work"),
        },
    )


def _facts(context: Context) -> None:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    context.note("versions", found)
    flags = {
        "matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn": torch.backends.cudnn.version(),
    }
    context.note("flags as torch sets them", flags)
    if context.stands_in:
        return
    for dtype in FLOAT_DTYPES:
        reason = why_not("triton", context.device, dtype)
        context.expect(not reason, f"Triton cannot run {dtype}: {reason}")
    properties = torch.cuda.get_device_properties(context.device)
    free, total = torch.cuda.mem_get_info(context.device)
    card = {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 MB": round(l2_bytes(properties) / 1e6, 1),
        "memory GB": round(total / 1e9, 1),
        "free GB": round(free / 1e9, 1),
        "devices": torch.cuda.device_count(),
        "torch has code for": " ".join(torch.cuda.get_arch_list()),
    }
    context.note("card", card)


def _clocks(context: Context, name: str = "clocks") -> None:
    for fields in ((*CLOCKS, *STATE), CLOCKS):  # one that a driver does not know spoils them all
        said = host.query(",".join(fields))
        if said is not None:
            context.note(name, dict(zip(fields, said.split(", "), strict=False)))
            return


def _copy(context: Context) -> None:
    size = context.sized(4 << 30, 8 << 20)
    source = torch.arange(size // 8, dtype=torch.int64, device=context.device)
    target = torch.zeros_like(source)
    seconds = fastest(context, lambda: target.copy_(source), context.sized(5, 1))
    context.expect(torch.equal(source, target), "a copy differs from what was copied")
    context.note("copy GB/s, read and written", round(2 * size / seconds / 1e9, 1))


def _product(context: Context) -> None:
    n = context.sized(8192, 64)
    a = torch.randn(n, n, device=context.device).to(torch.bfloat16)
    b = torch.randn(n, n, device=context.device).to(torch.bfloat16)
    seconds = fastest(context, lambda: torch.mm(a, b), context.sized(10, 1))
    row = torch.mm(a, b)[:1].double()
    exact = a[:1].double() @ b.double()
    error = float((row - exact).norm() / exact.norm())
    context.expect(error < 2.0**-8, f"a bf16 product is off by {error:.2g} of its size")
    context.note("bf16 TFLOP/s", round(2 * n**3 / seconds / 1e12, 1))


def fastest(context: Context, work: Callable[[], object], calls: int) -> float:
    """Seconds of one call, of the fastest turn of ``calls`` each, after a turn that warms up."""
    found = []
    for _ in range(TURNS + 1):
        context.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        context.synchronize()
        found.append((time.perf_counter() - began) / calls)
    return min(found[1:])


CHECK = Check(
    "device",
    "correctness",
    10.0,
    run,
    "The device, versions, TF32 flags and clocks; the bandwidth of a copy and bf16 products.",
)
