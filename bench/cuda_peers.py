"""What a network without us runs as on a GPU: eager in a CUDA graph, and torch.compile at its best.

Each is a `stepfuse.bench.peers.Build`. A call costs the host no launches per operator, as ours does
not in a captured step, so that the comparison is one of kernels. Results lie in memory of the
graph, which the next call writes over: a sampling loop has read them by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepfuse.bench.peers import Build, Call, compiling_quietly, copied

Mode = Literal["max-autotune", "reduce-overhead"]
WARM_UP = 3  # calls before a capture: kernels are loaded and algorithms chosen in them


def graphed(model: nn.Module, x: Tensor, t: Tensor, api: Any = None) -> Call:
    """The module as it is, one evaluation as one CUDA graph.

    ``api`` is ``torch.cuda``, or what stands in for it.
    """
    api = torch.cuda if api is None else api
    image, time = x.clone(), t.clone()
    with torch.no_grad(), api.device(x.device):
        side = api.Stream()
        side.wait_stream(api.current_stream())
        with api.stream(side):
            for _ in range(WARM_UP):
                model(image, time)
        api.current_stream().wait_stream(side)
        graph = api.CUDAGraph()
        with api.graph(graph):
            result: Tensor = model(image, time)

    def call(x: Tensor, t: Tensor) -> Tensor:
        image.copy_(x)
        time.copy_(t)
        graph.replay()
        return result

    return call


def compiled(model: nn.Module, x: Tensor, t: Tensor, mode: Mode) -> Call:
    """torch.compile in that mode for this shape; both replay CUDA graphs of PyTorch's own."""
    program: Any = torch.compile(model, mode=mode, dynamic=False)

    def call(x: Tensor, t: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        result: Tensor = program(x, t)
        return result

    with torch.no_grad(), compiling_quietly():
        for _ in range(WARM_UP):  # compiles, warms up and captures
            call(x, t)
    return call


def channels_last(build: Build, dtype: torch.dtype) -> Build:
    """The same with weights and images in ``dtype`` and channels-last, cuDNN's own layout."""

    def laid_out(model: nn.Module, x: Tensor, t: Tensor) -> Call:
        def image(x: Tensor) -> Tensor:
            return x.to(dtype, memory_format=torch.channels_last)

        run = build(copied(model, dtype), image(x), t)
        return lambda x, t: run(image(x), t).to(torch.float32)

    return laid_out


def _mode(mode: Mode) -> Callable[[nn.Module, Tensor, Tensor], Call]:
    return functools.partial(compiled, mode=mode)


max_autotune, reduce_overhead = _mode("max-autotune"), _mode("reduce-overhead")
