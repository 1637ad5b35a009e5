"""Models that can be given another forward, and how that is put in and taken away.

A denoiser is any model of diffusers whose forward takes a timestep: U-Nets of two and three
dimensions, transformers, ControlNets, priors.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from stepfuse.engine.adapters.diffusers.arguments import TIMES, Parameters
from stepfuse.engine.adapters.diffusers.forward import Forward
from stepfuse.engine.compile.weights.watched import turn_back

SUPPORTED = "models of diffusers whose forward takes a timestep (U-Nets, transformers, ControlNets)"


def is_denoiser(obj: Any) -> bool:
    """Whether ``obj`` is a model of diffusers with a timestep, found without importing diffusers"""
    return is_model(obj) and Parameters(type(obj).forward).time is not None


def is_model(obj: Any) -> bool:
    """Whether ``obj`` is a module of a class derived from diffusers' ``ModelMixin``."""
    return isinstance(obj, nn.Module) and any(
        kind.__name__ == "ModelMixin" and kind.__module__.partition(".")[0] == "diffusers"
        for kind in type(obj).__mro__
    )


def why_no_denoiser(module: nn.Module) -> str | None:
    """Why this module is no denoiser and what would help, None where it is one."""
    if is_denoiser(module) or _is_compiled(module):
        return None
    return (
        f"{type(module).__name__} is no model of diffusers whose forward takes a "
        f"{' or '.join(TIMES)}; stepfuse.optimize compiles any nn.Module"
    )


def obstacle(module: nn.Module) -> str | None:
    """Why the forward of this module cannot be replaced and what would help, or None."""
    if _is_compiled(module):
        kind = type(module).__name__
        return f"{kind} was given to torch.compile; accelerate the model without that"
    held = vars(module).get("forward")
    # removed hooks leave the class's own forward behind, bound
    if not (held is None or isinstance(held, Forward) or held == _own(module)):
        return (
            f"its forward was replaced already, by a {type(held).__name__}; take that away first "
            "(hooks for offloading: pipe.remove_all_hooks())"
        )
    return None


def _is_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or type(module).__name__ == "OptimizedModule"


def _own(module: nn.Module) -> Any:
    """The forward that the module has without any of its own."""
    return MethodType(type(module).forward, module)


def is_plain(module: nn.Module) -> bool:
    """Whether no forward of ours is in this module, not even under another."""
    return not any(isinstance(held, Forward) for held in vars(module).values())


def forward_of(module: Any) -> Forward | None:
    """The forward that an accelerated module has, None where it was not accelerated."""
    found = vars(module).get("forward")
    return found if isinstance(found, Forward) else None


def install(module: nn.Module, dtype: torch.dtype | None) -> Forward:
    """Give ``module`` a forward that runs compiled networks; one that it has already is kept.

    Raises ValueError where `obstacle` names one.
    """
    reason = obstacle(module)
    if reason is not None:
        raise ValueError(f"cannot accelerate {type(module).__name__}: {reason}")
    found = forward_of(module)
    if found is None:
        found = Forward(module, dtype, vars(module).get("forward"))
    elif found.dtype != dtype:
        found = Forward(module, dtype, found.hidden)
    vars(module)["forward"] = found
    return found


def check_removable(module: nn.Module) -> None:
    """Raise RuntimeError where somebody put another forward over ours."""
    if forward_of(module) is None and not is_plain(module):
        raise RuntimeError(
            f"the forward of {type(module).__name__} was replaced after it was accelerated; undo "
            "that first (hooks for offloading: pipe.remove_all_hooks())"
        )


def remove(module: nn.Module) -> None:
    """Take the forward away again, if there is one.

    Raises RuntimeError where somebody put another over it.
    """
    check_removable(module)
    found = forward_of(module)
    if found is None:
        return
    del vars(module)["forward"]
    if found.hidden is not None:
        vars(module)["forward"] = found.hidden
    found.forget()
    turn_back(module)
