"""A step as a CUDA graph, captured only where nothing in it can fail.

warm-up     twice: kernels are compiled and chosen, what a model builds once is built
rehearsal   once more, refusing whatever a capture would not survive
capture     nothing runs; launches are noted, with the addresses of what they read and write
replay      the launches again, in one, on the current stream
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.replay.capture import (
    CaptureRefused,
    NoCopies,
    Reading,
    Step,
    TensorsRead,
    calling_line,
    origin,
    refuse_host_reads,
)
from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import tree_leaves

WARM_UPS = 2
# of this thread alone: "global" would let an allocation of any other thread end the capture
_ERROR_MODE = "thread_local"
_aten = torch.ops.aten
# a device's caches cannot be emptied while it captures for another thread
_one_at_a_time = threading.RLock()


class CudaGraph:
    """``step``, done ``repeat`` times in one CUDA graph on ``device``.

    Capturing does not run the step's kernels, the warm-up does, on a stream of its own. A graph
    knows addresses only: the tensors that the step reads and did not make are held here, for as
    long as it can be replayed.

    Args:
        pool: of the graph whose memory this one shares; those of one pool must not run at the same
            time. None for memory of its own.
        api: ``torch.cuda``, or what stands in for it.

    Raises `CaptureRefused` for a step that a graph cannot hold, and in the warm-up whatever the
    step raises. Streams, memory pools and the random generator are then as they were before.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        repeat: int = 1,
        pool: Any = None,
        api: Any = None,
    ) -> None:
        self._api: Any = torch.cuda if api is None else api
        self.device = device
        self.pool = self._api.graph_pool_handle() if pool is None else pool
        with _one_at_a_time, self._api.device(device):
            side = _side_stream(self._api, device)
            here = self._api.current_stream(device)
            side.wait_stream(here)
            try:
                with self._api.stream(side):
                    for _ in range(WARM_UPS):
                        step()
                    self._rehearse(step)
            finally:
                here.wait_stream(side)
            self.graph = self._api.CUDAGraph()
            self.read = self._capture(step, repeat, side)

    def replay(self) -> None:
        """Launch the graph on the current stream of its device."""
        with self._api.device(self.device):
            self.graph.replay()

    def holds(self) -> bool:
        """Whether the tensors that it reads still lie where they lay."""
        return self.read.holds()

    def _rehearse(self, step: Step) -> None:
        try:
            with _refusing_waits(self._api), NoCopies(), _Rehearsal(self.device):
                step()
        except CaptureRefused:
            raise
        except RuntimeError as error:  # it ran before: this comes of being watched
            raise CaptureRefused(
                f"the step fails where the host may not wait: {error}, {origin(error)}"
            ) from error

    def _capture(self, step: Step, repeat: int, side: Any) -> TensorsRead:
        self._api.synchronize(self.device)
        gc.collect()  # a cycle may hold memory of the device
        self._api.empty_cache()
        _drop_workspaces()
        rehearsal = _Rehearsal(self.device)
        try:
            with self._api.stream(side):
                self._begin(side)
                try:
                    with NoCopies(), rehearsal:
                        for _ in range(repeat):
                            step()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # the first reason is the one to tell
                        self._end(side)
                        self.graph.reset()
                    raise
                self._end(side)
        except CaptureRefused:
            raise
        except RuntimeError as error:
            raise CaptureRefused(f"the CUDA graph could not be captured: {error}") from error
        finally:
            _drop_workspaces()
        return rehearsal.read

    def _begin(self, side: Any) -> None:
        try:
            self.graph.capture_begin(pool=self.pool, capture_error_mode=_ERROR_MODE)
        except BaseException:
            self._give_up(side)
            raise

    def _end(self, side: Any) -> None:
        """End the capture on the stream on which it began, whichever the step left as current."""
        try:
            with self._api.device(self.device), self._api.stream(side):
                self.graph.capture_end()
        except BaseException:
            self._give_up(side)
            raise

    def _give_up(self, side: Any) -> None:
        """Let go of the memory pool where the capture is over and PyTorch has not."""
        with contextlib.suppress(RuntimeError):  # where PyTorch had got that far
            for let_go in (torch_names.end_allocate_to_pool, torch_names.release_pool):
                if let_go is not None:
                    let_go(self.device.index, self.pool)
        with contextlib.suppress(RuntimeError):
            self.graph.reset()
        self._restore_generator(side)

    def _restore_generator(self, side: Any) -> None:
        """Capture one operation and drop it.

        The default generator, told of the beginning of a capture and not of its end, would refuse
        every random number from then on; after the end of another it is as before.
        """
        graph = self._api.CUDAGraph()
        with contextlib.suppress(RuntimeError), self._api.stream(side):
            graph.capture_begin(capture_error_mode=_ERROR_MODE)
            try:
                torch.zeros(1, device=self.device)
            finally:
                graph.capture_end()
            graph.reset()


class _Rehearsal(Reading):
    """Collects in ``read`` what is read, and refuses what a replay would not do again.

    Tensors on the host that the step makes are no reason: attention has some, for random numbers
    that it does not draw, and has them on the device where it is captured.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        refuse_host_reads(func, args)
        leaves = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        kinds = {leaf.device.type for leaf in leaves}
        before = {leaf.device.type for leaf in leaves if leaf not in self.made}
        on_host = self._device.type != "cpu" and "cpu" in before
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is _aten._to_copy.default:
            kinds.add(result.device.type)
        if len(kinds) > 1 and func in _COPIES:
            raise CaptureRefused(f"{func} copies between the host and the device, {calling_line()}")
        if on_host and func is not torch.ops.aten.lift_fresh.default:
            raise CaptureRefused(
                f"{func} reads a tensor on the host, whose value a replay would not read again, "
                f"{calling_line()}"
            )
        return result


_COPIES = (_aten._to_copy.default, torch.ops.aten.copy_.default)


@contextlib.contextmanager
def _refusing_waits(api: Any) -> Iterator[None]:
    """Inside, PyTorch raises where the host would wait for the device.

    It does so for the whole process. While other threads may read results of their own, only the
    operators of this thread are looked at.
    """
    if threading.active_count() > 1:
        yield
        return
    before = api.get_sync_debug_mode()
    with warnings.catch_warnings():  # the mode is said not to find every wait, once per process
        warnings.simplefilter("ignore")
        api.set_sync_debug_mode("error")
    try:
        yield
    finally:
        api.set_sync_debug_mode(before)


@functools.cache
def _side_stream(api: Any, device: torch.device) -> Any:
    """One for all warm-ups and captures on a device."""
    return api.Stream(device)


def _drop_workspaces() -> None:
    """Let cuBLAS take new memory for its products.

    It keeps some for every stream. Before a capture this makes it come from the graph's own pool,
    and after it no other graph is given the same, which may run at the same time.
    """
    if torch_names.clear_cublas_workspaces is not None:
        torch_names.clear_cublas_workspaces()
