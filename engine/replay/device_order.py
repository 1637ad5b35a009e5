"""In which order a device does what is launched on several of its streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeviceOrder:
    """Lets work on one stream wait for earlier work on another; off CUDA there is nothing to do.

        done() on stream a  ──►  wait() on stream b:  what b is given next runs after what a had

    Both mean the current stream of ``device`` in the calling thread.

    Args:
        api: ``torch.cuda``, or what stands in for it.
    """

    def __init__(self, device: torch.device, api: Any = None) -> None:
        self.device = device
        self._api: Any = torch.cuda if api is None else api
        self._event: Any = None
        self._stream: Any = None  # which it was recorded on

    def done(self) -> None:
        """Everything so far is to be waited for."""
        if not self._has_work():
            return
        with self._api.device(self.device):
            if self._event is None:
                self._event = self._api.Event()
            self._stream = self._api.current_stream(self.device)
            self._event.record(self._stream)

    def wait(self, *tensors: Tensor) -> None:
        """Go on after what was `done`.

        The memory of ``tensors`` goes to nobody else before what this stream does with them is
        over, on whatever stream they were made.
        """
        if self._event is None:
            return
        stream = self._api.current_stream(self.device)
        if stream == self._stream:
            return  # which does one thing after the other
        stream.wait_event(self._event)
        for tensor in tensors:
            if tensor.device == self.device:
                tensor.record_stream(stream)

    def finish(self) -> None:
        """Let the host wait until the stream is idle: memory that its work reads may be freed then.

        The allocator gives freed memory to the stream that asked for it first, which may not be the
        one that reads it.
        """
        if self._has_work():
            self._api.current_stream(self.device).synchronize()

    def _has_work(self) -> bool:
        return self.device.type == "cuda" and bool(self._api.is_initialized())
