"""A ``torch.cuda`` that is pretended: streams, events, memory pools and graphs, on CPU tensors.

Its graphs are as forgetful as those of a device. They know tensors by address: what they read has
to be held by somebody else, and a replay that finds some of it gone raises `Freed`. What a capture
that fails leaves behind, the pool, the generator and the stream, is left behind here, too.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from stepfuse.engine.replay.watching_mode import WatchingMode
from stepfuse.kernels import torch_names


class Freed(RuntimeError):
    """A replay reads memory that was given back."""


class _Old:
    """A tensor from before the capture, by its address."""

    def __init__(self, tensor: Tensor) -> None:
        self._ref, self._at = weakref.ref(tensor), _address(tensor)

    def tensor(self) -> Tensor:
        found = self._ref()
        if found is None or _address(found) != self._at:
            raise Freed("the memory was freed or moved")
        return found


class _Made:
    def __init__(self, number: int) -> None:
        self.number = number


def _address(tensor: Tensor) -> int:
    has_one = tensor.layout is torch.strided and type(tensor) in (Tensor, torch.nn.Parameter)
    return tensor.data_ptr() if has_one else 0


class _Launches(WatchingMode):
    """The operations of a capture, which holds nothing once it is over."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[int | None]]] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no id comes twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        noted = tree_map_only(Tensor, self._noted, (args, kwargs))
        given = {id(v) for v in tree_leaves((args, kwargs))}
        result = func(*args, **kwargs)
        made = [self._number(out, given) for out in tree_leaves(result)]
        self.calls.append((func, *noted, made))
        return result

    def _noted(self, tensor: Tensor) -> Any:
        number = self._numbers.get(id(tensor))
        return _Old(tensor) if number is None else _Made(number)

    def _number(self, out: Any, given: set[int]) -> int | None:
        if not isinstance(out, Tensor) or id(out) in given:
            return None
        self._alive.append(out)
        self._numbers[id(out)] = len(self._alive)
        return len(self._alive)

    def close(self) -> None:
        self._numbers.clear()
        self._alive.clear()

    def run(self) -> None:
        there: dict[int, Tensor] = {}

        def found(value: Any) -> Any:
            if isinstance(value, _Old):
                return value.tensor()
            return there[value.number] if isinstance(value, _Made) else value

        for func, args, kwargs, made in self.calls:
            args, kwargs = tree_map(found, (args, kwargs))
            for number, out in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                if number is not None:
                    there[number] = out


class Stream:
    """Work is numbered as it is launched; an event that is waited for is in ``after``."""

    def __init__(self, api: PretendedCuda, device: Any) -> None:
        self.api, self.device = api, api.index(device)
        self.after: list[Any] = []
        self.capturing = False

    def wait_stream(self, other: Stream) -> None:
        self.api.log.append(("wait_stream", self, other))

    def wait_event(self, event: Event) -> None:
        self.after.append(event.at)
        self.api.log.append(("wait_event", self, event.at))

    def synchronize(self) -> None:
        self.api.log.append(("synchronize", self))


class Event:
    """``at`` is where it was recorded last: the stream and how often any event had been."""

    def __init__(self, api: PretendedCuda) -> None:
        self.api, self.at = api, None

    def record(self, stream: Stream) -> None:
        assert stream.device == self.api.current_device(), "an event belongs to one device"
        self.api.log.append(("record", stream))
        self.at = (stream, len(self.api.log))


class Graph:
    """As ``torch.cuda.CUDAGraph``, with the order of what fails in `capture_end`."""

    def __init__(self, api: PretendedCuda) -> None:
        self.api, self._launches, self._over = api, _Launches(), False
        self.stream: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        api, self.stream = self.api, self.api.current_stream()
        assert self.stream is not api.default[self.stream.device], "on the default stream"
        if api.underway:
            raise RuntimeError("a capture is underway")
        self._pool = api.graph_pool_handle() if pool is None else pool
        assert self._pool not in api.dead, "a pool without graphs is used again"
        api.underway.add(self._pool)
        api.users[self._pool] += 1
        api.generator_captures = True
        if api.refusals:
            raise RuntimeError(api.refusals.pop())
        self.stream.capturing = True
        api.log.append(("capture", self.stream, capture_error_mode))
        self._launches.__enter__()

    def capture_end(self) -> None:
        api = self.api
        assert api.current_stream() is self.stream, "ends on the stream on which it began"
        self._launches.__exit__(None, None, None)
        self._launches.close()
        self.stream.capturing = False
        if api.failures:
            raise RuntimeError(api.failures.pop())
        api.underway.remove(self._pool)
        api.generator_captures, self._over = False, True
        if not self._launches.calls:
            raise RuntimeError("an empty graph")

    def reset(self) -> None:
        if self._over:
            self.api.release(self._pool)
        self._over = False

    __del__ = reset

    def replay(self) -> None:
        assert self._over, "it was not captured"
        self.api.log.append(("replay", self.api.current_stream()))
        self._launches.run()


class PretendedCuda:
    """The part of ``torch.cuda`` that captures use.

    Attributes:
        failures: messages with which the next captures fail at their end.
        refusals: messages with which they do not even begin.
        log: what was done, in order.
        underway: pools that a capture allocates from.
        users: graphs of each pool; ``dead`` are those that lost all of them.
        generator_captures: whether the random generator believes in a capture.
    """

    def __init__(self, devices: int = 1) -> None:
        self.default = [Stream(self, i) for i in range(devices)]
        self._current, self._streams = 0, list(self.default)
        self.failures: list[str] = []
        self.refusals: list[str] = []
        self.log: list[tuple[Any, ...]] = []
        self.underway: set[Any] = set()
        self.users: Counter[Any] = Counter()
        self.dead: set[Any] = set()
        self.generator_captures = False
        self._sync_mode, self._pools = 0, 0

    def index(self, device: Any) -> int:
        if isinstance(device, int):
            return device
        found = None if device is None else torch.device(device).index
        return self._current if found is None else found

    def state(self) -> Any:
        """What a capture must leave as it was."""
        streams = [(stream, stream.capturing) for stream in self._streams]
        used = {pool: count for pool, count in self.users.items() if count}
        pools = (set(self.underway), used, self.generator_captures)
        return self._current, streams, self._sync_mode, pools

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return self._current

    def current_stream(self, device: Any = None) -> Stream:
        return self._streams[self.index(device)]

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self._current = self._current, self.index(device)
        try:
            yield
        finally:
            self._current = before

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with self.device(stream.device):
            before, self._streams[stream.device] = self._streams[stream.device], stream
            try:
                yield
            finally:
                self._streams[stream.device] = before

    def Stream(self, device: Any = None) -> Stream:
        return Stream(self, device)

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self)

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    def graph_pool_handle(self) -> tuple[int, int]:
        self._pools += 1
        return 0, self._pools

    def synchronize(self, device: Any = None) -> None:
        assert not self.current_stream(device).capturing

    def empty_cache(self) -> None:
        if self.underway:
            raise RuntimeError("captures_underway is not empty")

    def get_sync_debug_mode(self) -> int:
        return self._sync_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self._sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[call-overload]

    def end_pool(self, device: int, pool: Any) -> None:
        """``torch._C._cuda_endAllocateToPool``."""
        if pool not in self.underway:
            raise RuntimeError("not recording to the pool")
        self.underway.remove(pool)

    def release(self, pool: Any) -> None:
        """``torch._C._cuda_releasePool``, of a device."""
        self.users[pool] -= 1
        assert self.users[pool] >= 0, "released twice"
        if not self.users[pool]:
            self.dead.add(pool)


def pretend(patch: pytest.MonkeyPatch, devices: int = 1) -> PretendedCuda:
    """One in whose place PyTorch's own functions for memory pools are put, too."""
    api = PretendedCuda(devices)
    patch.setattr(torch_names, "end_allocate_to_pool", api.end_pool)
    patch.setattr(torch_names, "release_pool", lambda device, pool: api.release(pool))
    return api
