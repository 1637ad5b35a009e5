"""A method of a module as a module of its own, `AutoencoderKL.decode` say."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from stepfuse.kernels.checks import received


class Method(nn.Module):
    """``module.name(...)``, the method that its class has, as a forward."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self._name = module, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns."""
        return getattr(type(self.module), self._name)(self.module, *args, **kwargs)


def as_module(name: str, value: Any) -> nn.Module:
    """``value`` where it is a module, a `Method` where it is one of a module's.

    TypeError for anything else, and for functions that were bound to a module by hand.
    """
    if isinstance(value, nn.Module):
        return value
    module, function = getattr(value, "__self__", None), getattr(value, "__func__", None)
    if inspect.ismethod(value) and isinstance(module, nn.Module):
        # a decorated function may go by another name than the method
        for kind in type(module).__mro__:
            for method, held in vars(kind).items():
                if held is function:
                    return Method(module, method)
    raise TypeError(f"{name} must be an nn.Module or a method of one; got {received(value)}")
