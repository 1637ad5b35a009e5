"""Why the original method of a model must run a call, in what is around it or in its modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import pytree

# hooks of the module itself, which run around its forward, whatever that is
AROUND = ("_forward_hooks", "_forward_pre_hooks")


def not_now(module: nn.Module, x: Tensor, condition: dict[str, Any]) -> str | None:
    """What around this call wants the original."""
    if torch.is_grad_enabled() and _wants_gradient(module, x, condition):
        return "a gradient is wanted; call under torch.no_grad() for the compiled network"
    if (
        torch_names.len_dispatch_stack()
        or torch_names.peek_functorch() is not None
        or torch_names.tracing_state() is not None
    ):
        return (
            "traced, recorded or transformed by somebody else; a sf.Sampler takes the model as it "
            "was before accelerate, or what sf.optimize makes of it"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return "autocast is on; its dtype is an option of accelerate"
    if torch.get_default_device().type not in ("cpu", device):
        return "the default device is not that of the sample"
    return None


def _wants_gradient(module: nn.Module, x: Tensor, condition: dict[str, Any]) -> bool:
    tensors = [*module.parameters(), x, *pytree.tree_leaves(condition)]
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


class ModuleState:
    """Why the modules of a model must run as they are, asked again when something has changed.

    What else a change means (another adapter, its scale, a switch of a submodule) is noticed by the
    compiled network, see `stepfuse.engine.compile.state.python_state`.
    """

    def __init__(self, module: nn.Module) -> None:
        ignored = frozenset(f"model.{table}" for table in AROUND)
        self.holds = PythonState({"model": module}, contents=False, ignored=ignored).holds
        self.reason = _reason(module)


def _reason(module: nn.Module) -> str | None:
    inner = [part for part in module.modules() if part is not module]
    if any(part._forward_hooks or part._forward_pre_hooks for part in inner):
        return "a submodule has a forward hook"  # those of the model itself run around its forward
    if any(m.training and getattr(m, "p", 0) and "Dropout" in _name(m) for m in inner):
        return "dropout is on; call eval() for the compiled network"
    for part in inner:
        processor = getattr(part, "processor", None)
        if processor is not None and not _is_theirs(processor):
            return f"attention by {_name(processor)}; one of diffusers' own can be compiled"
    return None


def _is_theirs(processor: Any) -> bool:
    """Whether it is attention of diffusers, which is a function of its inputs, of its weights and
    of attributes that do not change while it runs: one trace of it holds.
    """
    return type(processor).__module__.partition(".")[0] == "diffusers"


def _name(obj: Any) -> str:
    return type(obj).__name__
