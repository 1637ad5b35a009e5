"""How an op becomes a PyTorch operator, and when a call may skip the dispatcher.

Each op is registered in the ``stepfuse`` namespace: a schema, one implementation for CPU and CUDA
tensors (which picks the backend by name), a fake, and a gradient. Compilers, exporters, recorders
and autograd see that operator, one call an update. A plain eager call needs none of it, and the
dispatcher's way there and back costs more than a small update, so `eager` says when an op may run
its kernel at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "stepfuse"
# owns the schemas as long as the process runs
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass (fake, functional, distributed) wants dispatch


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register ``schema`` ("op(Tensor x) -> Tensor") and return the operator to call.

    ``run`` serves CPU and CUDA tensors, ``fake`` gives the shapes, ``setup`` and ``backward`` are
    those of `torch.library.register_autograd`. A ``run`` that writes into its arguments raises
    their versions itself, and each has its tensors `resolved`.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    name = schema[: schema.index("(")]
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)  # type: ignore[no-untyped-call]
    for key in ("Negative", "ZeroTensor"):  # the op's own to resolve, dispatched or not
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, key)  # type: ignore[no-untyped-call]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def raise_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors were written, which raw-pointer kernels do not.

    It then refuses to use what it saved of them, instead of returning wrong gradients.
    """
    torch._C._increment_version(tensors)


def eager(*tensors: Tensor | None) -> bool:
    """True where the kernel may run at once: plain tensors, no gradient, nobody watching.

    Watching are torch.compile and torch.export, dispatch and function modes (fake tensors,
    recorders, default devices), functorch transforms, tracing and the profiler.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    grad = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or (grad and x.requires_grad)):
            return False
    return True


def records_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """True where autograd would want the gradient of one of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
