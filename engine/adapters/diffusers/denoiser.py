"""Models of diffusers: which can be given another forward, and how that is put in and taken away.

A denoiser is any model of diffusers whose forward takes a timestep: U-Nets of two and three
dimensions, transformers, ControlNets, priors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stepfuse.engine.adapters.diffusers.arguments import TIMES, Parameters
from stepfuse.engine.adapters.diffusers.forward import Forward
from stepfuse.engine.compile.weights.watched import turn_back

SUPPORTED = "models of diffusers whose forward takes a timestep (U-Nets, transformers, ControlNets)"


def is_denoiser(obj: Any) -> bool:
    """Whether ``obj`` is a model of diffusers with a timestep, found without importing diffusers"""
    return isinstance(obj, nn.Module) and is_model(obj) and _time(obj) is not None


def is_model(obj: Any) -> bool:
    """Whether the class of ``obj`` is derived from diffusers' ``ModelMixin``."""
    return any(
        kind.__name__ == "ModelMixin" and kind.__module__.partition(".")[0] == "diffusers"
        for kind in type(obj).__mro__
    )


def obstacle(module: nn.Module, name: str = "forward") -> str | None:
    """Why the method ``name`` of this model cannot be replaced and what would help, or None."""
    kind = type(module).__name__
    if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return f"{kind} was given to torch.compile; accelerate the model without that"
    if name == "forward" and not is_denoiser(module):
        return (
            f"{kind} is no model of diffusers whose forward takes a {' or '.join(TIMES)}; "
            "stepfuse.optimize compiles any nn.Module"
        )
    held = vars(module).get(name)
    # removed hooks leave the class's own forward behind, bound
    if not (held is None or isinstance(held, Forward) or held == _own(module, name)):
        return (
            f"its {name} was replaced already, by a {type(held).__name__}; take that away first "
            "(hooks for offloading: pipe.remove_all_hooks())"
        )
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether no method of ours is in this model, not even under another."""
    return not any(isinstance(held, Forward) for held in vars(module).values())


def forward_of(module: Any, name: str = "forward") -> Forward | None:
    """The method ``name`` that an accelerated model has, None where it was not accelerated."""
    found = vars(module).get(name)
    return found if isinstance(found, Forward) else None


def install(module: nn.Module, dtype: torch.dtype | None, name: str = "forward") -> Forward:
    """Give ``module`` a method that runs compiled networks; one that it has already is kept.

    Raises ValueError where `obstacle` names one.
    """
    reason = obstacle(module, name)
    if reason is not None:
        raise ValueError(f"cannot accelerate the model: {reason}")
    found = forward_of(module, name)
    if found is None:
        found = Forward(module, dtype, vars(module).get(name), name)
    elif found.dtype != dtype:
        found = Forward(module, dtype, found.hidden, name)
    vars(module)[name] = found
    return found


def check_removable(module: nn.Module, name: str = "forward") -> None:
    """Raise RuntimeError where somebody put another method over ours."""
    hidden = any(
        isinstance(held, Forward) and held.name == name and key != name
        for key, held in vars(module).items()
    )
    if hidden and forward_of(module, name) is None:
        raise RuntimeError(
            f"the {name} of {type(module).__name__} was replaced after it was accelerated; undo "
            "that first (hooks for offloading: pipe.remove_all_hooks())"
        )


def remove(module: nn.Module, name: str = "forward") -> None:
    """Take the method away again, if there is one.

    Raises RuntimeError where somebody put another over it.
    """
    check_removable(module, name)
    found = forward_of(module, name)
    if found is None:
        return
    del vars(module)[name]
    if found.hidden is not None:
        vars(module)[name] = found.hidden
    found.forget()
    turn_back(module)


def _own(module: nn.Module, name: str) -> Any:
    """The method that the model has without any of its own."""
    return getattr(type(module), name).__get__(module)


def _time(module: nn.Module) -> str | None:
    return Parameters(type(module).forward).time
