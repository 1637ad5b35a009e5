"""Where the device's time goes: kernels by name, and by kind.

conv        convolutions                gemm        other matrix products
attention   fused attention             ours        Triton kernels of this package
norm        PyTorch's normalisations    layout      copies, concatenations, turned layouts
pointwise   element by element          other       none of these
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from stepfuse.bench.gpu_check.check import Context
from stepfuse.bench.gpu_check.timing import rounded

CALLS, TOP, LETTERS = 3, 15, 110
OUR_KERNELS = frozenset(
    ("_apply", "_statistics", "_kernel", "_fill", "_sums", "_finish", "_dx", "_parameters")
)
ATTENTION = ("flash", "fmha", "attention", "sdpa")
CONVOLUTION = ("fprop", "implicit_gemm", "implicit_convolve", "winograd", "::_conv")
# after those two, the first kind of which a word stands in the name, in small letters
KINDS = (
    ("norm", ("layernorm", "layer_norm", "groupnorm", "group_norm", "rowwise", "fusedparam")),
    ("layout", ("memcpy", "memset", "catarray", "nchw", "nhwc", "transpose", "copy", "convert")),
    ("layout", ("aten::cat", "aten::clone", "aten::contiguous")),
    ("conv", ("conv", "dgrad")),
    ("gemm", ("gemm", "nvjet", "splitk", "cutlass", "cublas", "linear", "addmm", "::mm", "bmm")),
    ("pointwise", ("elementwise", "vectorized", "reduce", "triton_", "gelu", "silu")),
    ("pointwise", ("aten::add", "aten::mul")),
)


def kind_of(kernel: str) -> str:
    """The kind of a kernel or operator, by its name.

    cuDNN names the layout of the images in its convolutions: they turn no layouts.
    """
    if kernel.partition("(")[0] in OUR_KERNELS or kernel.startswith("stepfuse::"):
        return "ours"
    name = kernel.lower()
    if any(word in name for word in ATTENTION):
        return "attention"
    if any(word in name for word in CONVOLUTION):
        return "conv"
    return next((kind for kind, words in KINDS if any(w in name for w in words)), "other")


def breakdown(context: Context, call: Callable[[], Any]) -> dict[str, Any]:
    """Of a call: milliseconds and kernels "by kind", and its "longest" kernels."""
    activities = [context.sized(ProfilerActivity.CUDA, ProfilerActivity.CPU)]
    call()
    context.synchronize()
    with profile(activities=activities) as found:
        for _ in range(CALLS):
            call()
        context.synchronize()
    return summary(_kernels(context, found.key_averages()))


def summary(kernels: Sequence[tuple[str, float, int]]) -> dict[str, Any]:
    """Of (name, microseconds, count) over all profiled calls, per call."""
    kinds: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for name, us, count in kernels:
        kinds[kind_of(name)] += us / 1e3 / CALLS
        counts[kind_of(name)] += count
    kinds["all"], counts["all"] = sum(kinds.values()), sum(counts.values())
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:TOP]
    return {
        "by kind": {
            kind: {"ms": rounded(ms), "kernels": counts[kind] // CALLS}
            for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])
        },
        "longest": [
            {
                "ms": rounded(us / 1e3 / CALLS),
                "count": count // CALLS,
                "kind": kind_of(name),
                "kernel": name[:LETTERS],
            }
            for name, us, count in longest
        ],
    }


def _kernels(context: Context, averages: Any) -> list[tuple[str, float, int]]:
    if context.stands_in:
        return [(e.key, e.self_cpu_time_total, e.count) for e in averages if e.self_cpu_time_total]
    return [
        (event.key, event.self_device_time_total, event.count)
        for event in averages
        if event.device_type == DeviceType.CUDA and event.self_device_time_total
    ]
