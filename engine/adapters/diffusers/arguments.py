"""The arguments of a denoiser's call: which is the sample, which the timestep, which the rest.

unet(sample, timestep, encoder_hidden_states, ...)
transformer(hidden_states, encoder_hidden_states, pooled_projections, timestep, ...)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels.torch_names import pytree

# what models of diffusers call the timestep
TIMES = ("timestep", "timesteps", "timestep_ratio")
_LEAVES = (Tensor, bool, int, float, str, type(None))
_UNFIT = "arguments that do not fit"


@dataclass(frozen=True)
class Given:
    """One call: ``x`` [N, ...], the ``timestep`` where there is one, and by name what else came.

    ``return_dict`` is what was asked for, None where the method has no such parameter.
    """

    x: Tensor
    timestep: Any
    condition: dict[str, Any]
    return_dict: bool | None


class Parameters:
    """Those of ``method``, a function whose first parameter is its module.

    ``x`` is the name of the sample, ``time`` that of the timestep, None where it has none.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        declared = list(inspect.signature(method).parameters.values())[1:]
        named = [p for p in declared if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._names = [parameter.name for parameter in named]
        self._any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in declared)
        self.x = self._names[0] if self._names else ""
        self.time = next((name for name in TIMES if name in self._names[1:]), None)
        self._return_dict = next((p.default for p in named if p.name == "return_dict"), None)
        # None says of these what leaving them out says
        self._optional = {parameter.name for parameter in named if parameter.default is None}

    @property
    def per_sample(self) -> bool:
        """Whether one timestep stands for one per sample, as in every U-Net of diffusers."""
        return self.x == "sample"

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | str:
        """What came, or why no compiled network takes it; the original also words the errors."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        known = self._any_name or named.keys() <= set(self._names)
        if len(named) != len(args) + len(kwargs) or not known or self.x not in named:
            return _UNFIT
        if self.time is not None and named.get(self.time) is None:
            return _UNFIT
        x, timestep = named.pop(self.x), named.pop(self.time or "", None)
        if not isinstance(x, Tensor) or x.dim() < 2 or not len(x):
            return f"{self.x} is not a tensor [N, ...]"
        if not isinstance(timestep, (Tensor, int, float, type(None))):
            return f"{self.time} is a {type(timestep).__name__}"
        return_dict = named.pop("return_dict", self._return_dict)
        if not isinstance(return_dict, bool | None):
            return f"return_dict is a {type(return_dict).__name__}"
        condition = {
            name: value
            for name, value in named.items()
            if value is not None or name not in self._optional
        }
        for name, value in condition.items():
            if name.endswith("attention_kwargs") and isinstance(value, dict) and "scale" in value:
                # of the adapters, which the forward would scale and scale back at every call
                return f"argument {name} with a scale; set_adapters takes it once for all calls"
            for leaf in pytree.tree_leaves(value):
                if type(leaf) not in _LEAVES and not isinstance(leaf, Tensor):
                    return f"argument {name} holds a {type(leaf).__name__}"
        return Given(x, timestep, condition, return_dict)


def fits(reason: str) -> bool:
    """Whether ``reason`` is any but that the call is wrong, which the original says."""
    return reason != _UNFIT


def contiguous(condition: dict[str, Any]) -> dict[str, Any]:
    """The same with contiguous tensors: one network is compiled for all layouts."""
    return {name: _contiguous(value) for name, value in condition.items()}


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous()
    return pytree.tree_map_only(Tensor, torch.Tensor.contiguous, value)
