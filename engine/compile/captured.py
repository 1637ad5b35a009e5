"""A compiled network as a graph of its own: launched as a whole, not operator by operator.

    arguments ──copy──► static inputs ──► graph of the network ──► static results ──copy──► results

On CUDA a small batch is bound by the host that launches some hundred kernels per evaluation. A
graph launches them at once. It reads and writes memory that never moves; what it is given and what
it returns are copies, so that a caller may keep every result.

A graph goes on reading where the network's constants and table lay when it was captured, which are
kept as long as it is: `CompiledNetwork.moves` tells when another must be captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from stepfuse.engine.compile.compiled import Compiled
from stepfuse.engine.compile.listening import is_listened_to, unseen
from stepfuse.engine.compile.network import CompiledNetwork
from stepfuse.engine.compile.numbered import Numbered
from stepfuse.engine.replay.cuda_graph import CudaGraph
from stepfuse.engine.replay.device_order import DeviceOrder
from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import pytree

GraphMode = Literal["auto"]
Run = Callable[[], list[Any]]
_PLAIN = (Tensor, nn.Parameter)
_RESTLESS = 16  # captures of one network, after which it runs operator by operator


class Graph(Protocol):
    """A run that can be done again on the memory it was captured on, its ``results`` among it."""

    results: Sequence[Any]

    def replay(self) -> None:
        """Do it once: the results are those of what lies in that memory now."""


class Graphs(Protocol):
    """Where graphs come from: the only place that knows of CUDA."""

    def serves(self, device: torch.device) -> bool:
        """Whether there are graphs for this type of device."""

    def busy(self) -> bool:
        """Whether somebody is capturing what runs here now."""

    def capture(self, run: Run, device: torch.device) -> Graph:
        """``run`` as a graph; it runs a few times. Raises RuntimeError where it cannot be one."""

    def order(self, device: torch.device) -> Order:
        """What lets replays of one graph follow each other, on whatever streams they are."""


class Order(Protocol):
    """For the launches of one graph, which uses one memory in all of them: see `DeviceOrder`."""

    def wait(self, *tensors: Tensor) -> None:
        """What is launched next waits for what was `done`."""

    def done(self) -> None:
        """What was launched so far is to be waited for."""


class CudaGraphs:
    """Those of CUDA."""

    def serves(self, device: torch.device) -> bool:
        """There are some for every CUDA device."""
        return device.type == "cuda"

    def busy(self) -> bool:
        """As CUDA says of the current stream."""
        return bool(torch.cuda.is_current_stream_capturing())

    def capture(self, run: Run, device: torch.device) -> Graph:
        """Warmed up and captured on a stream of ``device``."""
        return _CudaGraph(run, device)

    def order(self, device: torch.device) -> Order:
        """By events."""
        return DeviceOrder(device)


class _CudaGraph:
    """``run`` as a CUDA graph; the results of its last run were made by the capture."""

    def __init__(self, run: Run, device: torch.device) -> None:
        results: list[Any] = []
        self.results: Sequence[Any] = results

        def step() -> None:
            results[:] = run()

        self.replay: Callable[[], None] = CudaGraph(step, device).replay


GRAPHS: Graphs = CudaGraphs()


class Captures:
    """The graphs of the networks of one `Optimized`, each captured at its first call.

    A graph dies with its network. Where none can be had, the network runs operator by operator, and
    `described` says why.
    """

    def __init__(self, mode: GraphMode | None) -> None:
        self._mode = mode
        self._known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
        self._capturing = threading.RLock()

    def __call__(self, network: Compiled | Numbered, leaves: Sequence[Any]) -> Any:
        """What ``network(leaves)`` returns; gradients are off."""
        device = _device(leaves)
        if self._mode is None or device is None or not GRAPHS.serves(device):
            return network(leaves)
        if _is_recorded(leaves) or GRAPHS.busy():
            return network(leaves)
        known = self._known.get(network) or self._known.setdefault(network, _Known())
        captured = known.captured
        if known.refused:
            return network(leaves)
        if captured is None or not captured.holds(network):
            captured = self._capture(known, network, leaves, device)
            if captured is None:
                return network(leaves)
        known.replays += 1
        return captured(leaves)

    def described(self, network: Compiled | Numbered) -> str:
        """Captured or not, and why, in words; "" where there are no graphs for such a device."""
        known = self._known.get(network)
        if known is None:
            return ""
        if known.refused:
            return f"none, operator by operator: {known.refused}"
        times = "" if known.captures == 1 else f" {known.captures} times"
        return f"captured{times}, {known.replays} replays"

    def _capture(
        self,
        known: _Known,
        network: Compiled | Numbered,
        leaves: Sequence[Any],
        device: torch.device,
    ) -> Captured | None:
        """The network as it is now; None where it cannot be captured, for the reason noted."""
        with self._capturing:
            if known.captured is not None and known.captured.holds(network):
                return known.captured  # another thread was here
            known.captured = None  # its memory can be used for the next
            known.refused = _obstacle(network, leaves, device)
            if known.captures == _RESTLESS:
                known.refused = f"what it reads was put elsewhere {_RESTLESS} times"
            if not known.refused:
                try:
                    known.captured = Captured(network, leaves, device)
                    known.captures += 1
                except RuntimeError as error:
                    known.refused = str(error).strip() or type(error).__name__
            return known.captured


class _Known:
    """What is known of one network."""

    def __init__(self) -> None:
        self.captured: Captured | None = None
        self.refused = ""
        self.captures = self.replays = 0


class Captured:
    """``network`` as one graph, for leaves like these.

    Raises RuntimeError where it cannot be captured.
    """

    def __init__(
        self, network: Compiled | Numbered, leaves: Sequence[Any], device: torch.device
    ) -> None:
        self._lies = _lies(network)
        self._lock = threading.Lock()
        with unseen():
            static = [torch.empty_like(v).copy_(v) if isinstance(v, Tensor) else v for v in leaves]
            self._inputs = [(i, v) for i, v in enumerate(static) if isinstance(v, Tensor)]
            runs = ref(network)  # which owns the graph: the graph must not own it
            specs: list[Any] = []

            def run() -> list[Any]:
                one = runs()
                assert one is not None
                results, spec = pytree.tree_flatten(one(static))
                specs[:] = [spec]
                return results

            self._graph = GRAPHS.capture(run, device)
            (self._spec,) = specs
            self._order = GRAPHS.order(device)
        self._buffers = [buffer for _, buffer in self._inputs]

    def holds(self, network: Compiled | Numbered) -> bool:
        """Whether all that it reads is where it was, and the table still what it was read for."""
        return self._lies == _lies(network)

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Results in memory of their own."""
        with self._lock:
            self._order.wait(*self._buffers)
            for i, buffer in self._inputs:
                buffer.copy_(leaves[i])
            self._graph.replay()
            results = [v.clone() if isinstance(v, Tensor) else v for v in self._graph.results]
            self._order.done()
        return pytree.tree_unflatten(results, self._spec)


def _lies(network: Compiled | Numbered) -> tuple[Any, ...]:
    """Equal as long as a graph of the network reads what the network would."""
    inner = network.network if isinstance(network, Numbered) else network
    if not isinstance(inner, CompiledNetwork):
        return ()
    tabulated = inner.table is not None and inner.table.table is not None
    return inner.moves, tabulated, *(v.data_ptr() for v in inner.unwatched)


def _obstacle(network: Compiled | Numbered, leaves: Sequence[Any], device: torch.device) -> str:
    """Why the network cannot be captured, as far as that is known before, or ""."""
    inner = network.network if isinstance(network, Numbered) else network
    if not isinstance(inner, CompiledNetwork):
        return "there is no graph of its operators"
    others = {str(v.device) for v in leaves if isinstance(v, Tensor) and v.device != device}
    if others:
        return f"an argument is on {min(others)}, another on {device}"
    return inner.effect


def _device(leaves: Sequence[Any]) -> torch.device | None:
    """That of the first tensor."""
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)


def _is_recorded(leaves: Sequence[Any]) -> bool:
    """Whether somebody wants to see every operator, or the tensors are none with values."""
    return bool(
        torch_names.len_dispatch_stack()
        or is_listened_to()
        or torch_names.tracing_state() is not None
        or torch_names.peek_functorch() is not None
        or any(isinstance(leaf, Tensor) and type(leaf) not in _PLAIN for leaf in leaves)
    )
