"""Tracers exchange methods and built-in functions for everybody; here for their own thread alone.

torch.fx puts functions of its own over ``nn.Module.__getattr__`` and ``__call__`` while it traces,
and torch.export over ``max``, ``min`` and ``math.pow``. A model that runs in another thread
meanwhile would get proxies for its modules.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

from stepfuse.kernels import torch_names

_EXCHANGED = ((builtins, "max"), (builtins, "min"), (math, "pow"))


@contextlib.contextmanager
def in_this_thread() -> Iterator[None]:
    """Inside, what torch.fx exchanges keeps its old meaning in other threads."""
    patcher = torch_names.find("torch.fx._symbolic_trace", "_Patcher")
    with _exchanged(patcher, "patch_method", _patching_here):
        yield


@contextlib.contextmanager
def exporting_in_this_thread() -> Iterator[None]:
    """Inside, what torch.export exchanges does."""
    # large, and most networks are traced without it
    tracing = torch_names.find("torch.export", "_trace")
    with _exchanged(tracing, "_override_builtin_ops", _overriding_here):
        yield


def _patching_here(before: Callable[..., None]) -> Callable[..., None]:
    def patch_method(self: Any, cls: type, name: str, new_fn: Any, *rest: Any, **more: Any) -> None:
        before(self, cls, name, _here(new_fn, getattr(cls, name)), *rest, **more)

    return patch_method


def _overriding_here(override: Callable[[], Any]) -> Callable[[], Any]:
    @contextlib.contextmanager
    def overriding() -> Iterator[None]:
        before = [getattr(module, name) for module, name in _EXCHANGED]
        with override():
            for (module, name), old in zip(_EXCHANGED, before, strict=True):
                setattr(module, name, _here(getattr(module, name), old))
            yield

    return overriding


def _here(new: Callable[..., Any], old: Callable[..., Any]) -> Callable[..., Any]:
    """``new`` in this thread, ``old`` in every other."""
    thread = threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == thread else old)(*args, **kwargs)

    with contextlib.suppress(AttributeError):
        functools.update_wrapper(chosen, new)
    return chosen


@contextlib.contextmanager
def _exchanged(owner: Any, name: str, made: Callable[[Any], Any]) -> Iterator[None]:
    """``owner.name`` is what is ``made`` of it, if this PyTorch has such a name at all."""
    before = getattr(owner, name, None)
    if before is None:
        yield
        return
    setattr(owner, name, made(before))
    try:
        yield
    finally:
        setattr(owner, name, before)
