"""What the matrix products of the C++ module can do here, which convolve and attention are made of.

See csrc/products.h. Nothing of the module is loaded before one of these functions is called, and
none of them raises where it was not built.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from stepfuse.kernels import backends


@functools.cache
def why_not(dtype: torch.dtype) -> str:
    """Why there are no products in this dtype; empty where there are."""
    native = _native()
    if native is None:
        return "no C++ module"
    if dtype is torch.bfloat16 and not native.bfloat16_products:
        return "no dot products of bfloat16"
    return "" if dtype in (torch.float32, torch.bfloat16) else f"not for {dtype}"


@functools.cache
def vector_channels() -> int:
    """How many channels are computed together; 0 where there is no module."""
    native = _native()
    return 0 if native is None else int(native.wide)


def whole_vectors(*channels: int) -> bool:
    """Whether these numbers of channels are computed together without a rest."""
    together = vector_channels()
    return together > 0 and not any(count % together for count in channels)


def _native() -> Any:
    if backends.why_not("cpp"):
        return None
    return importlib.import_module("stepfuse.kernels.cpp.module").native
