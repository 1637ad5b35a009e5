"""Work on one stream waits for that on another, and memory for whoever reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tests.engine.replay.pretended_cuda import PretendedCuda

from stepfuse.engine.replay.device_order import DeviceOrder

SECOND = torch.device("cuda", 1)


class Memory(SimpleNamespace):
    """A tensor as far as streams are concerned."""

    def record_stream(self, stream: Any) -> None:
        self.stream = stream


def test_another_stream_of_the_same_device_waits() -> None:
    api = PretendedCuda(devices=2)
    order, first, second = DeviceOrder(SECOND, api), api.Stream(1), api.Stream(1)
    order.wait()
    assert api.log == [], "nothing was launched"
    with api.stream(first), api.device(0):
        order.done()
    assert order._event.at[0] is first, "though another device was the current one"
    here, elsewhere = Memory(device=SECOND), Memory(device=torch.device("cpu"))
    with api.stream(second), api.device(0):
        order.wait(here, elsewhere)
    assert second.after == [order._event.at]
    assert here.stream is second
    assert not hasattr(elsewhere, "stream")
    order.finish()
    assert api.log[-1] == ("synchronize", api.default[1])


def test_there_is_nothing_to_wait_for_on_the_cpu_or_before_cuda_is_used() -> None:
    api = PretendedCuda()
    api.is_initialized = lambda: False  # type: ignore[method-assign]
    for order in (DeviceOrder(torch.device("cpu")), DeviceOrder(torch.device("cuda", 0), api)):
        order.done()
        order.wait(torch.ones(1))
        order.finish()
    assert api.log == []


def test_one_stream_need_not_wait_for_itself() -> None:
    api = PretendedCuda(devices=2)
    order, first, second = DeviceOrder(SECOND, api), api.Stream(1), api.Stream(1)
    buffer = Memory(device=SECOND)
    waited = []
    for stream in (first, first, second, second, first):
        with api.stream(stream):
            before = len(stream.after)
            order.wait(buffer)
            waited.append(len(stream.after) - before)
            order.done()
    assert waited == [0, 0, 1, 0, 1]
