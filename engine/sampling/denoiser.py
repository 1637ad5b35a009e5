"""One contract for every model: x, t and a condition in, the raw prediction out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import Optimized
from stepfuse.engine.sampling.condition import Kept
from stepfuse.engine.sampling.uncapturable import check_refusal
from stepfuse.kernels.arguments import check_callable, check_kind, flag_or_precision
from stepfuse.kernels.checks import as_device

Model = nn.Module | Callable[..., Any]
Condition = Mapping[str, Any]


class Denoiser:
    """Calls ``model(x, t, **condition)`` and returns its prediction as one tensor.

    x goes to the model in the dtype of its weights (unchanged where it has none); the output may be
    a tensor, an object with ``.sample`` (diffusers) or a tuple whose first entry is the tensor.
    """

    def __init__(self, model: Model) -> None:
        check_callable("model", model, "callable as model(x, t, **condition)")
        check_refusal(model)
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

    def place(self, device: torch.device | str | None) -> torch.device:
        """Where x lies for this model: ``device``, with its number, or by default as the weights.

        Raises TypeError or ValueError for what names no device of this machine, and for another
        than that of the weights.
        """
        if device is None:
            return self.device or torch.device("cpu")
        asked = as_device("device", device)
        own = self.device
        if own is not None:
            if asked.type != own.type or asked.index not in (None, own.index):
                raise ValueError(f"device must be that of the model's weights, {own}; got {asked}")
            return own
        if asked.type == "meta":
            raise ValueError("device must be one that computes, 'cpu' or 'cuda:0' say; got 'meta'")
        try:
            return torch.empty(0, device=asked).device
        except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
            why = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"device must be one that this machine has; got '{asked}': {why}"
            ) from None

    def check_timesteps(self, timesteps: Sequence[float]) -> None:
        """ValueError where a model that asks for whole timesteps would get others.

        It says so by ``integer_timesteps = True``.
        """
        between = [t for t in timesteps if not isinstance(t, int)]
        if between and getattr(_original(self.model), "integer_timesteps", False):
            raise ValueError(
                f"timesteps must be whole for {type(_original(self.model)).__name__} "
                f"(integer_timesteps=True); got {between[0]:.6g}"
            )

    @property
    def differentiable(self) -> bool:
        """Whether autograd sees the model; one that it does not says ``differentiable = False``."""
        return bool(getattr(_original(self.model), "differentiable", True))

    def parameters(self) -> list[Tensor]:
        """Weights and buffers of the model, none for a plain function."""
        if self.module is None:
            return []
        return [*self.module.parameters(), *self.module.buffers()]

    def takes_batch(self, count: int) -> bool:
        """Whether the model takes that many samples; one that says nothing takes any number."""
        takes: Any = getattr(_original(self.model), "takes_batch", None)
        return takes is None or bool(takes(count))

    def check_labels(self, condition: Condition) -> None:
        """ValueError or TypeError where a model that knows its classes gets labels it has not.

        Such a model names the argument in ``label_input`` and has a ``check_labels``, which waits
        for the device: to be called before the steps, not in one.
        """
        model = _original(self.model)
        name = getattr(model, "label_input", None)
        given = None if name is None else condition.get(name)
        if given is not None and not isinstance(given, Kept):
            model.check_labels(given)


def optimized(model: Model, optimize: bool | torch.dtype, max_networks: int) -> Model:
    """What a caller's ``optimize`` makes of the model: True, a dtype, or False for as it is.

    Raises TypeError or ValueError for another value, and for a model that is no nn.Module.
    """
    dtype = flag_or_precision("optimize", optimize)
    if not optimize or isinstance(model, Optimized):
        return model
    check_kind("a model for optimize", model, nn.Module, "an nn.Module")
    return Optimized(model, dtype, (), max_networks)  # type: ignore[arg-type]


def _original(model: Model) -> Any:
    """The model itself where it is an optimised one."""
    return getattr(model, "original", model)
