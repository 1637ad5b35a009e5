"""One contract for every model: x, t and a condition in, the raw prediction out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.passes.parked import home

Model = nn.Module | Callable[..., Any]
Condition = Mapping[str, Any]


class Denoiser:
    """Calls ``model(x, t, **condition)`` and returns its prediction as one tensor.

    x goes to the model in the dtype of its weights (unchanged where it has none); the output may be
    a tensor, an object with ``.sample`` (diffusers) or a tuple whose first entry is the tensor.
    """

    def __init__(self, model: Model) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **condition); got {model!r}")
        self.model = model
        self.module = model if isinstance(model, nn.Module) else None
        weights = [p for p in self.parameters() if p.is_floating_point()]
        self.dtype = weights[0].dtype if weights else None
        self.device = weights[0].device if weights else None

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw model output [N, C or 2C, ...] for x [N, C, ...] and t int64 [N]."""
        output = self.model(x if self.dtype is None else x.to(self.dtype), t, **condition)
        prediction = output
        if isinstance(output, tuple):
            prediction = output[0]
        elif not isinstance(output, Tensor):
            prediction = getattr(output, "sample", None)
        if not isinstance(prediction, Tensor):
            raise TypeError(
                "model must return a tensor, an object with .sample or a tuple that starts with a "
                f"tensor; got {type(output).__name__}"
            )
        return prediction

    def parameters(self) -> list[Tensor]:
        """Weights and buffers of the model, none for a plain function."""
        if self.module is None:
            return []
        return [*self.module.parameters(), *self.module.buffers()]

    def check_weights(self) -> None:
        """Let an optimised model raise where it holds copies of weights that were changed since."""
        check = getattr(self.model, "check_weights", None)
        if check is not None:
            check()

    def fingerprint(self) -> tuple[tuple[int, int], ...]:
        """Identity and address of every weight: changes when one is replaced, not when updated."""
        return tuple((id(p), home(p)) for p in self.parameters())


def split_condition(condition: Condition, start: int, stop: int) -> dict[str, Any]:
    """The condition of samples ``start`` .. ``stop`` - 1: tensors are cut, the rest is shared."""
    return {k: v[start:stop] if isinstance(v, Tensor) else v for k, v in condition.items()}


def check_condition(condition: Condition | None, count: int) -> dict[str, Any]:
    """A condition whose tensors have one entry per sample; ValueError otherwise."""
    checked = dict(condition or {})
    for name, value in checked.items():
        if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] != count):
            raise ValueError(
                f"condition {name!r} must have one entry per sample ({count}); "
                f"got shape {tuple(value.shape)}"
            )
    return checked


def static_copy(condition: Condition) -> dict[str, Any]:
    """The same condition in buffers of its own, which a captured step may read again and again."""
    return {k: torch.clone(v) if isinstance(v, Tensor) else v for k, v in condition.items()}
