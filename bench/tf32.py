"""TensorFloat-32 off while candidates are compared: float32 products of 24 bits, for all alike.

On a GPU, cuDNN rounds the factors of a float32 convolution to 11 bits unless it is told not to, and
cuBLAS does not. Images of such a network differ from those of exact products by more than
`stepfuse.bench.verify` allows, and its time is that of another precision. What a candidate wants
to be fast in, it says: "bf16".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

NOTE = (
    "TF32 was off for every candidate (cuDNN's convolutions and cuBLAS's products): fp32 is fp32."
)


@contextmanager
def tf32_off(device: torch.device) -> Iterator[None]:
    """Inside, float32 products on ``device`` are exact; afterwards the settings are as they were.

    Nothing is touched unless ``device`` is a GPU.
    """
    with tf32(False) if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Inside, float32 products and convolutions on GPUs may use TF32, or may not."""
    before = settings()
    try:
        for place in _switches():
            place.allow_tf32 = on
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def settings() -> list[tuple[Any, str, Any]]:
    """What PyTorch is set to: (where, name, value), in the order in which it is to be set again.

    The switches ``allow_tf32`` come first, and then the names ``fp32_precision`` of newer PyTorch,
    where it has them. After somebody has set a name, its switch cannot be read: RuntimeError.
    """
    found = []
    for place in _switches():
        with suppress(RuntimeError):
            found.append((place, "allow_tf32", place.allow_tf32))
    found += [
        (place, "fp32_precision", place.fp32_precision)
        for place in _named()
        if hasattr(place, "fp32_precision")
    ]
    return found


def _switches() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, torch.backends.cudnn


def _named() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    parts = (getattr(cudnn, name, None) for name in ("conv", "rnn"))
    return [torch.backends.cuda.matmul, *(part for part in parts if part is not None)]
