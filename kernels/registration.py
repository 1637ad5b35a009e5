"""How an op becomes a PyTorch operator, and when a call may skip the dispatcher.

Each op is registered in the ``stepfuse`` namespace: a schema, one implementation for the tensors of
its devices (which picks the backend by name), a fake, and a gradient. Compilers, exporters,
recorders and autograd see that operator, one call an update. A plain eager call needs none of it,
and the dispatcher's way there and back costs more than a small update, so `eager` says when an op
may run its kernel at once, and `Operator` what a straight line of recorded calls may call instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from stepfuse.kernels import torch_names

NAMESPACE = "stepfuse"  # of what is computed in kernels/, each op in files of its name
Device = Literal["CPU", "CUDA"]
_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass (fake, functional, distributed) wants dispatch


@dataclass(frozen=True)
class Operator:
    """What is known of an operator beside what PyTorch keeps of it.

    Args:
        module: where it is defined.
        devices: whose tensors it takes.
        direct: makes what may be called in its stead at one place of a straight line of calls,
            where nobody watches: with the same arguments and the same result.
        blank: a tensor without memory that is laid out like a result, where the direct call takes
            ``out``: a tensor like it to put the result into.
    """

    module: str
    devices: Sequence[Device]
    direct: Callable[[], Callable[..., Any]] | None
    blank: Callable[[Tensor], Tensor] | None


OPERATORS: dict[Any, Operator] = {}  # by what `define` returned


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    devices: Sequence[Device] = ("CPU", "CUDA"),
    direct: Callable[[], Callable[..., Any]] | None = None,
    blank: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Register ``schema`` ("op(Tensor x) -> Tensor") and return the operator to call.

    ``run`` serves the tensors of ``devices``, ``fake`` gives the shapes, ``setup`` and ``backward``
    are those of `torch.library.register_autograd`, ``direct`` and ``blank`` those of `Operator`. A
    ``run`` that writes into its arguments raises their versions itself, and each has its tensors
    `resolved`. An operator that no file in kernels/ computes has a namespace of its own before its
    name: "mine::op(Tensor x) -> Tensor".
    """
    namespace, _, signature = schema.rpartition("::")
    namespace = namespace or NAMESPACE
    library = _library(namespace)
    library.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    name = signature[: signature.index("(")]
    for device in devices:
        library.impl(name, run, device)
    for key in ("Negative", "ZeroTensor"):  # the op's own to resolve, dispatched or not
        library.impl(name, torch.library.fallthrough_kernel, key)
    qualified = f"{namespace}::{name}"
    torch.library.register_fake(qualified, fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=library)
    made = getattr(getattr(torch.ops, namespace), name).default
    OPERATORS[made] = Operator(run.__module__, devices, direct, blank)
    return made


@functools.cache
def _library(namespace: str) -> Any:
    """Owns the schemas of a namespace as long as the process runs."""
    return torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]


C = TypeVar("C", bound="OperatorCall")


@dataclass(frozen=True)
class OperatorCall:
    """The arguments of one call of an operator, by name.

    Subclasses have a field for each argument, in the order of the schema. Values are tensors, or
    nodes of a graph that stand for them.
    """

    @classmethod
    def of(cls: type[C], arguments: Sequence[Any]) -> C:
        """From the arguments in their order."""
        return cls(*arguments)

    def arguments(self) -> tuple[Any, ...]:
        """All arguments in their order."""
        return tuple(getattr(self, field.name) for field in fields(self))


def raise_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors were written, which raw-pointer kernels do not.

    It then refuses to use what it saved of them, instead of returning wrong gradients.
    """
    torch_names.increment_version(tensors)


def eager(*tensors: Tensor | None) -> bool:
    """True where the kernel may run at once: plain tensors, no gradient, nobody watching.

    Watching are torch.compile and torch.export, dispatch and function modes (fake tensors,
    recorders, default devices), functorch transforms, tracing and the profiler.
    """
    if (
        torch.compiler.is_compiling()
        or torch_names.len_dispatch_stack()
        or torch_names.len_function_stack()
        or torch_names.functorch_is_active()
        or torch_names.tracing_state() is not None
        or torch_names.profiler_is_on()
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
