"""Which backend runs an op, and the reason where one cannot.

Every op has up to three implementations with one contract, each in its own folder:

    kernels/reference/<op>.py   plain PyTorch, any device, float64 too; the truth
    kernels/cpp/<op>.py         C++ on raw pointers, CPU tensors
    kernels/triton/<op>.py      Triton, CUDA tensors (CPU tensors under TRITON_INTERPRET=1)

``resolve("auto", device)`` takes C++ for CPU tensors and Triton for CUDA tensors, and falls back to
the reference where those are not installed; asking for a backend by name never falls back. What
compiled networks call on the CPU (convolve, attention, concatenate) has no choice of backend, and
none with Triton.

What a backend's ``run`` may rely on, and need not check: shapes agree and everything is on one
device; int64 tensors and tables are contiguous; tensors with the spatial dimensions of x, results
included, are all contiguous or all channels-last, and have the dtype of x, except that model
outputs share one of their own. Parameters ([C] or [N, C]) have any of `FLOAT_DTYPES`, channels side
by side.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, get_args

import torch

Backend = Literal["auto", "reference", "cpp", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says why and what to install."""


def why_not(
    backend: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> str:
    """The reason ``backend`` cannot run tensors of ``device`` and ``dtype``; empty where it can.

    Raises ValueError for a backend that does not exist.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        got = repr(backend) if isinstance(backend, str) else type(backend).__name__
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {got}")
    kind = torch.device(device).type
    if backend in ("auto", "reference"):
        return ""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        return f"the {backend} backend takes float32, bfloat16 and float16, got {dtype}"
    if backend == "cpp":
        if kind != "cpu":
            return f"the cpp backend runs CPU tensors, got a tensor on {kind}"
        return _cpp_problem()
    problem = _triton_problem()
    if problem:
        return problem
    if kind != "cuda" and not interpreting():
        return (
            f"the triton backend runs CUDA tensors, got a tensor on {kind}; "
            "set TRITON_INTERPRET=1 to run its kernels on the CPU, slowly"
        )
    return ""


def resolve(backend: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """The backend that will run: ``backend`` itself, or the fastest that can for "auto".

    Raises BackendUnavailable with the reason where a backend asked for by name cannot run.
    """
    if isinstance(backend, str) and backend == "auto":
        preferred = "cpp" if torch.device(device).type == "cpu" else "triton"
        return "reference" if why_not(preferred, device, dtype) else preferred
    reason = why_not(backend, device, dtype)
    if reason:
        raise BackendUnavailable(reason)
    return backend


def function(op: str, name: str, backend: str, x: torch.Tensor) -> Callable[..., Any]:
    """``name`` of the module of ``op`` in the backend that will run for ``x``."""
    if isinstance(backend, str) and backend == "auto":
        found: Callable[..., Any] = _preferred(op, name, x.device, x.dtype)
        return found
    module = implementation(op, resolve(backend, x.device, x.dtype))
    return getattr(module, name)  # type: ignore[no-any-return]


@functools.cache
def _preferred(op: str, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    # "auto" depends on what is installed, never on a setting, so that one look is enough
    return getattr(implementation(op, resolve("auto", device, dtype)), name)


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module ``stepfuse.kernels.<backend>.<op>``."""
    return importlib.import_module(f"stepfuse.kernels.{backend}.{op}")


def interpreting() -> bool:
    """True where Triton kernels run on CPU tensors instead of being launched on a GPU."""
    return _on_cpu > 0 or os.environ.get("TRITON_INTERPRET", "0") == "1"


_on_cpu = 0


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Inside, backend="triton" accepts CPU tensors: for code that exchanges Triton's launcher."""
    global _on_cpu
    _on_cpu += 1
    try:
        yield
    finally:
        _on_cpu -= 1


@functools.cache
def _cpp_problem() -> str:
    try:
        importlib.import_module("stepfuse.kernels.cpp.module")
    except ImportError as error:
        return (
            f"the C++ module is not there ({error}); install a compiler and `pip install .` again"
        )
    return ""


@functools.cache
def _triton_problem() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not there ({error}); `pip install 'stepfuse[triton]'`"
    return ""
