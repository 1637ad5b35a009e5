"""Times of a few alternatives, taken where they will run."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from stepfuse.engine.compile.heap import trim
from stepfuse.engine.compile.timings import answer
from stepfuse.kernels import torch_names
from stepfuse.kernels.checks import FLOATS
from stepfuse.kernels.filters import Form, filters_shape
from stepfuse.kernels.torch_names import disable_current_modes, pop_function_mode

T = TypeVar("T")
_CACHE = 48 << 20  # bytes: more than the part of a last-level cache that one process may count on
_HOPELESS = 1.5
_PLAIN = (Tensor, nn.Parameter)  # fake ones have nothing that could be read
_between: ContextVar[tuple[Tensor, ...]] = ContextVar("_between", default=())


def exceed_cache(gm: GraphModule) -> bool:
    """Whether the network's weights are too large to stay in the cache between two evaluations."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder" and "weight" in n.meta]
    held: int = sum(n.meta["val"].nbytes for n in placeholders)
    return held > _CACHE // 2


@contextlib.contextmanager
def reading(weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside, what empties the caches before a measurement is reading as much of ``weights``.

    It is what an evaluation does between two uses of a layer, and needs no memory of its own: a
    network that exceeds the cache has weights enough. Those outside the CPU are left out.
    """
    there = [w for w in weights if type(w) in _PLAIN and w.device.type == "cpu"]
    chosen: list[Tensor] = []
    read = 0
    for weight in sorted(there, key=lambda w: w.nbytes, reverse=True):
        if read < _CACHE and weight.dtype in FLOATS:
            chosen.append(weight.detach())
            read += weight.nbytes
    token = _between.set(tuple(chosen))
    try:
        yield
    finally:
        _between.reset(token)


def scratch_operand(count: int, dtype: torch.dtype) -> Tensor:
    """``count`` numbers of no meaning to multiply with: memory of a weight of `reading`, which is
    out of the cache like all of them, or zeros where none is large enough.
    """
    size = count * dtype.itemsize
    # the largest is read first, and so least likely to be in the cache still
    lender = next((w for w in _between.get() if w.nbytes >= size and w.is_contiguous()), None)
    if lender is None:
        return torch.zeros(count, dtype=dtype)
    return lender.flatten().view(torch.uint8)[:size].view(dtype)


def blank_filters(
    shape: Sequence[int], forms: Sequence[Form], dtype: torch.dtype, plain: bool = False
) -> dict[Form, Tensor]:
    """Numbers in place of `filters` of a weight of this shape: one `scratch_operand` for all."""
    shapes = {form: filters_shape(shape, form, dtype, plain) for form in forms}
    memory = scratch_operand(max(map(math.prod, shapes.values())), dtype)
    return {form: memory[: math.prod(size)].view(size) for form, size in shapes.items()}


def trial(seconds: Callable[..., T]) -> Callable[..., T]:
    """Call once per arguments and keep the result; what was held for it is given back.

    The heap would otherwise keep memory of every shape, in pieces that do not fit the next. Modes
    that watch whoever compiles do not see it: what runs at once in a network would take the long
    way here, and look slow. Where `Timings` are recorded or replayed, they are told, or asked.
    """

    @functools.cache
    def measured(*args: Any) -> T:
        with _unwatched():
            result = seconds(*args)
        trim()
        return result

    @functools.wraps(seconds)
    def asked(*args: Any) -> T:
        given: T = answer(seconds, args, functools.partial(measured, *args))
        return given

    asked.cache_clear = measured.cache_clear  # type: ignore[attr-defined]
    return asked


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """No mode of PyTorch's is in force inside, neither of dispatch nor of functions."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(disable_current_modes())
        while torch_names.len_function_stack():
            stack.enter_context(pop_function_mode())
        yield


def best_times(
    runs: Sequence[Callable[[], Any]], repeats: int, warm: Tensor | None = None
) -> list[float]:
    """The least seconds of each of ``runs``, which take turns ``repeats`` times after a warm-up.

    One that is half as slow again as another after two turns takes no more part.

    With one thread it is the thread's own processor time, which other processes do not lengthen;
    with more it is the clock. Where ``warm`` is given, caches hold that tensor before every run
    and beside it nothing but weights of `reading`.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(runs)
    with torch.no_grad():
        for repeat in range(-1, repeats):
            for i, run in enumerate(runs):
                if repeat > 1 and best[i] > _HOPELESS * min(best):
                    continue
                if warm is not None:
                    for other in _between.get():
                        other.sum()
                    warm.sum()
                start = clock()
                run()
                if repeat >= 0:
                    best[i] = min(best[i], clock() - start)
    return best
