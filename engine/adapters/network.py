"""The network inside another library's loop: compiled where that pays, itself where it must be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from stepfuse.engine.compile.optimize import Optimized, WeightsChanged
from stepfuse.engine.compile.timetable import CAPACITY
from stepfuse.kernels import torch_names
from stepfuse.kernels.arguments import check_precision
from stepfuse.kernels.backends import why_not
from stepfuse.kernels.checks import check_flag


def check_options(optimize: Any, dtype: Any, strict: Any, backend: Any) -> None:
    """TypeError or ValueError for options that cannot be meant."""
    check_flag("optimize", optimize)
    check_flag("strict", strict)
    check_precision("dtype", dtype)
    why_not(backend)


class FastNetwork:
    """``model`` through `stepfuse.optimize` in ``dtype``, kept in step with its weights.

    Copies and pickles compile again when they run.
    """

    def __init__(self, model: Any, optimize: bool, dtype: torch.dtype | None) -> None:
        self.model, self._options = model, (optimize, dtype)
        self._fast: Optimized | None = None
        self._reason, self._announces = "", True
        if not optimize:
            self._reason = "optimize=False"
        elif not isinstance(model, nn.Module):
            self._reason = f"the model is a {type(model).__name__}, not an nn.Module"
        else:
            precision = None if dtype is torch.float32 else dtype
            self._fast = Optimized(model, precision, (), 8)
            self._settings = _settings(model)

    def of(self, model: Any) -> FastNetwork:
        """This one, or one with its options where ``model`` is another."""
        return self if model is self.model else FastNetwork(model, *self._options)

    def ready(self, timesteps: Iterable[int] = ()) -> Any:
        """What to call for ``timesteps``, all of them, up to date with the model's weights."""
        fast = self._fast
        # with gradients on, those of the parameters may be wanted too
        if fast is None or torch.is_grad_enabled() or _obstacle(self.model):
            return self.model
        if _settings(self.model) != self._settings:
            # moved or converted: nothing that was compiled fits any longer
            fast = self._fast = Optimized(self.model, fast.dtype, (), 8)
            self._settings = _settings(self.model)
        try:
            fast.check_weights()
        except WeightsChanged:
            fast.refresh()
        new = set(timesteps).difference(fast.timesteps)
        if new and max(new) >= CAPACITY:
            # announcing some of them would leave the others without a row
            self._announces = False
            if fast.timesteps:
                fast = self._fast = Optimized(self.model, fast.dtype, (), 8)
        if new and self._announces:
            fast.prepare(sorted(new))
        return fast

    def explain(self) -> str:
        """What was compiled, or why the model runs as it is."""
        if self._fast is None:
            return f"as it is: {self._reason}"
        obstacle = _obstacle(self.model)
        return f"as it is: {obstacle}" if obstacle else self._fast.explain()


def _obstacle(model: nn.Module) -> str:
    """Why a compiled network would not do what the model does now; empty where it would."""
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "a module has a forward hook"
        if module.training and isinstance(module, torch_names.NormBase):
            return "a batch normalisation is in training mode; call eval()"
        if module.training and isinstance(module, torch_names.DropoutNd) and module.p > 0:
            return "dropout is on; call eval()"
    settings = _settings(model)
    if settings is not None and torch.is_autocast_enabled(settings[1].type):
        return "autocast is on"
    return ""


def _settings(model: nn.Module) -> Any:
    first = next(model.parameters(), None)
    return None if first is None else (first.dtype, first.device)
