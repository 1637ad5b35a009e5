"""Refuses a step that records gradients, before PyTorch does.

A node of autograd's graph wants a stream of its tensor's device, and without CUDA that ends the
process: there is no exception to catch. A mode sees every function of a thread before it runs. What
would run out of its sight is brought back into it, or refused:

    another thread            has no modes, and gradients on
    torch.compile             runs its code with modes of its own: inside, it runs the function
    DisableTorchFunction      switches modes off: inside, only the methods of subclasses
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepfuse.engine.replay.capture import CaptureRefused, calling_line
from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import tree_leaves


@contextmanager
def no_autograd() -> Iterator[None]:
    """Inside, in this thread, `CaptureRefused` is raised where a gradient would be recorded."""
    stance: Any = torch.compiler.set_stance
    with stance("force_eager"), torch_names.modes_stay_on(), _no_threads(), _NoAutograd():
        yield


@contextmanager
def _no_threads() -> Iterator[None]:
    """Inside, this thread starts no other: its work would not be on the stream of a capture."""
    here, start = threading.get_ident(), threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if threading.get_ident() == here:
            raise CaptureRefused(
                "a thread is started inside the step, whose work a capture would not see, "
                f"{calling_line()}"
            )
        start(self)

    threading.Thread.start = refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


class _NoAutograd(TorchFunctionMode):
    """Keeps gradients off, and refuses with its line what would have been recorded."""

    def __init__(self) -> None:
        super().__init__()
        self._wanted = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch_names.set_grad_enabled:
            self._wanted = bool(args[0])
            return None
        # the other way to switch them on is inference_mode(False)
        if self._wanted or torch.is_grad_enabled() or func in _BACKWARD:
            leaves = tree_leaves((args, kwargs))
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
                name = getattr(func, "__name__", func)
                raise CaptureRefused(
                    f"autograd runs inside the step ({name} of a tensor that requires a gradient), "
                    f"which cannot be examined without a GPU, {calling_line()}"
                )
        return func(*args, **kwargs)


_BACKWARD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
