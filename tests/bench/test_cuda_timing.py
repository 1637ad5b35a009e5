"""Timing by events, on a device that is pretended: a stream whose clock only work advances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepfuse.bench.cuda_timing import FLUSH, L2_BYTES, CudaTimer, l2_bytes
from stepfuse.bench.timing import Turns, Work

L2 = 50 << 20
LAUNCH, KERNEL, WRITE = 0.004, 0.250, 0.080  # milliseconds


class Device:
    """Work is queued when it is launched and done when somebody waits."""

    def __init__(self, l2: int | None = L2, current: int = 0) -> None:
        self.current = current
        self.queue: list[tuple[str, Any]] = []
        self.log: list[str] = []
        self.clock = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing, "an event without a time"
                self.at: float | None = None

            def record(self, stream: int) -> None:
                assert stream == device.current, "a stream of another device"
                device.launch("event", self)

            def synchronize(self) -> None:
                device.wait()

            def elapsed_time(self, end: Any) -> float:
                assert self.at is not None, "read before the device passed it"
                assert end.at is not None, "read before the device passed it"
                return float(end.at - self.at)

        self.Event = Event
        self.properties = SimpleNamespace(**({} if l2 is None else {"L2_cache_size": l2}))

    def get_device_properties(self, device: int) -> Any:
        return self.properties

    def current_device(self) -> int:
        return self.current

    def current_stream(self, device: int) -> int:
        """Each device has one, of its own number."""
        return device

    @contextmanager
    def device(self, device: int) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def synchronize(self, device: Any = None) -> None:
        assert device == self.current, "the work is on another device"
        self.wait()
        self.log.append("synchronize")

    def launch(self, what: str, detail: Any = None) -> None:
        self.queue.append((what, detail))

    def wait(self) -> None:
        for what, detail in self.queue:
            self.clock += {"kernel": KERNEL, "flush": WRITE, "event": 0.0}[what]
            if what == "event":
                detail.at = self.clock
            self.log.append(what)
        self.queue.clear()

    def flush(self, size: int) -> Callable[[], None]:
        self.flushed = size
        return lambda: self.launch("flush")


@pytest.fixture
def device() -> Device:
    return Device()


def timer(device: Device) -> CudaTimer:
    return CudaTimer(0, device, device.flush)


def test_once_is_the_time_of_the_work_alone(device: Device) -> None:
    """Neither the flush nor the launches are in it."""
    seconds = timer(device)(lambda: device.launch("kernel"))
    assert seconds == pytest.approx(KERNEL / 1e3)
    assert device.log == ["synchronize", "flush", "event", "kernel", "event"]


def test_the_flush_is_larger_than_the_cache(device: Device) -> None:
    timer(device)
    assert device.flushed == FLUSH * L2
    assert FLUSH > 1


def test_work_that_is_still_running_is_waited_for(device: Device) -> None:
    device.launch("kernel")
    assert timer(device)(lambda: device.launch("kernel")) == pytest.approx(KERNEL / 1e3)
    assert device.log[:2] == ["kernel", "synchronize"]


def test_replays_are_timed_inside_one_pair_of_events(device: Device) -> None:
    count = 20
    work = Work(lambda: device.launch("kernel"), calls=count)
    turns = Turns({"replay": work}, timer=timer(device)).run(1)
    assert turns.seconds["replay"] == pytest.approx([KERNEL / 1e3])
    assert device.log == ["synchronize", "flush", "event", *["kernel"] * count, "event"]


def test_every_time_has_events_of_its_own(device: Device) -> None:
    """An event that is recorded again forgets the first time."""
    calls = timer(device)
    found = [calls(lambda n=n: [device.launch("kernel") for _ in range(n)]) for n in (1, 3)]
    assert found == pytest.approx([KERNEL / 1e3, 3 * KERNEL / 1e3])
    assert device.log.count("event") == 4


@pytest.mark.parametrize("named", [1, "cuda:1", torch.device("cuda", 1)])
def test_work_runs_on_the_device_that_is_timed(device: Device, named: Any) -> None:
    """Where another is the current one, that is back afterwards."""
    calls, at = CudaTimer(named, device, device.flush), []

    def run() -> None:
        at.append(device.current)
        device.launch("kernel")

    assert calls(run) == pytest.approx(KERNEL / 1e3)
    assert at == [1]
    assert device.current == 0


@pytest.mark.parametrize("named", [None, "cuda", torch.device("cuda")])
def test_a_device_without_a_number_is_the_one_that_was_current(named: Any) -> None:
    device = Device(current=1)
    calls = CudaTimer(named, device, device.flush)
    device.current = 0
    calls(lambda: device.launch("kernel"))
    assert calls.device == 1


def test_a_device_that_does_not_say_has_a_large_cache() -> None:
    assert l2_bytes(Device(None).properties) == L2_BYTES
    assert l2_bytes(Device(0).properties) == L2_BYTES
    assert l2_bytes(Device(L2).properties) == L2
