"""The clock of the speed checks: CUDA graphs of what is timed, by turns, in medians of ratios.

Of a call there are three times, and the medians over the rounds are what is noted:

    device   between two events around it, after a write over twice the L2 cache
    host     until the call returns: what Python and the launches cost
    wall     until the device has done it

Where the CPU stands in, nothing is captured and all three are by the wall clock.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from stepfuse.bench import samples
from stepfuse.bench.able import described
from stepfuse.bench.cuda_timing import WARM_UP, l2_bytes
from stepfuse.bench.gpu_check.check import Context
from stepfuse.bench.timing import rounds, timer_for, undisturbed
from stepfuse.kernels import torch_names

Call = Callable[[], Any]
T = TypeVar("T")


@dataclass
class Times:
    """Seconds of a call, one of each kind for a round; ``failed`` says why there are no more."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    failed: str = ""

    def milliseconds(self, calls: int = 1) -> dict[str, float | int]:
        """Medians of what was timed, each of one of ``calls``, and the number of rounds."""
        found: dict[str, float | int] = {"rounds": len(self.device)}
        for name in ("device", "host", "wall"):
            values = getattr(self, name)
            if values:
                found[f"{name}_ms"] = rounded(1e3 * statistics.median(values) / calls)
        return found


class Clock:
    """Times calls on the context's device."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.device = timer_for(context.device)[0]

    def host(self, call: Call) -> tuple[float, float]:
        """Seconds until ``call`` returns, and until its work is done."""
        self.context.synchronize()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        self.context.synchronize()
        return returned - start, time.perf_counter() - start

    def alternate(
        self,
        calls: Mapping[str, Call],
        most: int,
        limit_s: float | None = None,
        *,
        device_only: bool = False,
    ) -> dict[str, Times]:
        """Times of every call, in rounds of one turn each; the first of a round takes turns, too.

        A call that raises is left out from there on. Garbage is collected afterwards.
        """
        found = {name: Times() for name in calls}
        with undisturbed():
            for done in rounds(most, limit_s):
                names = [name for name in calls if not found[name].failed]
                first = done % max(len(names), 1)
                for name in names[first:] + names[:first]:
                    self._turn(calls[name], found[name], device_only)
        return found

    def _turn(self, call: Call, times: Times, device_only: bool) -> None:
        try:
            device = self.device(call)
            host = None if device_only else self.host(call)
        except Exception as error:  # of whatever library it is
            times.failed = described(error)
            return
        times.device.append(device)
        if host is not None:
            times.host.append(host[0])
            times.wall.append(host[1])


def ratio(slower: Times, faster: Times, kind: str = "device") -> float | None:
    """How many times longer the first takes: the median over the rounds; None without a round."""
    pair = getattr(slower, kind), getattr(faster, kind)
    return rounded(samples.ratio(*pair)) if all(pair) else None


def captured(context: Context, run: Call, warm_up: int = WARM_UP) -> Call:
    """``run`` as a CUDA graph: the call that replays it. On the stand-in, ``run`` itself.

    It is warmed up on the stream of the capture, the last time with every wait for the device an
    error. After a capture that fails the stream and the allocator are what they were, so that
    others can be tried. Raises what ``run`` raises.
    """
    if context.stands_in:
        for _ in range(warm_up):
            run()
        return run
    with torch.cuda.device(context.device):
        stream = torch.cuda.Stream(context.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up - 1):
                run()
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
            context.synchronize()
            torch.cuda.empty_cache()  # the graph's memory is its own
            graph = _capture(run)
        torch.cuda.current_stream().wait_stream(stream)
    return functools.partial(_replay, graph, run)


def _capture(run: Call) -> Any:
    """The graph of ``run`` on the current stream; on failure its pool is given back."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    done = False
    try:
        with undisturbed():  # what is collected inside could free memory, which is refused
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        done = True
    finally:
        if not done:
            for give_back in (torch_names.end_allocate_to_pool, torch_names.release_pool):
                with contextlib.suppress(Exception):  # it may have been given back already
                    give_back(torch.cuda.current_device(), pool)
    return graph


def _replay(graph: Any, run: Call) -> None:
    # the graph holds addresses only; ``run`` holds the tensors that lie there
    graph.replay()


def tf32_flags() -> dict[str, bool]:
    """What is set now."""
    return {
        "matmul": bool(torch.backends.cuda.matmul.allow_tf32),
        "cudnn": bool(torch.backends.cudnn.allow_tf32),
    }


def cache_bytes(context: Context) -> int:
    """Bytes of the L2 cache; a small number on the stand-in."""
    if context.stands_in:
        return 1 << 12
    return l2_bytes(torch.cuda.get_device_properties(context.device))


def attempt(context: Context, name: str, make: Callable[[], T]) -> T | None:
    """What ``make`` returns; where it raises, None, and the fact ``name`` says why."""
    try:
        return make()
    except Exception as error:  # of whatever library it is
        context.note(name, f"failed: {described(error)}")
        return None


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact| over all elements, in float64; NaN where either holds NaN."""
    difference = (got.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-30))


def rounded(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")
