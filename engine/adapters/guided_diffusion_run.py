"""What a loop of guided-diffusion's starts from, and what its steps share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepfuse.engine.adapters.guided_diffusion_rows import Step


@dataclass
class Run:
    """What the steps of one loop share."""

    step: Step
    network: Any
    table: Tensor
    times: Tensor  # [T]: what the network is told at each index
    eta: float
    draws: bool
    cond_fn: Callable[..., Tensor] | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)


def with_bar(indices: Sequence[int], progress: bool) -> Iterable[int]:
    """The indices, with a progress bar where one is asked for."""
    bar: Iterable[int] = tqdm(indices) if progress else indices
    return bar


def device_of(model: Any) -> torch.device:
    """Theirs is the first parameter's; a function has none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"give device=: the model is a {type(model).__name__}, not an nn.Module")
    return next(model.parameters()).device


def start_dtype(given: dict[str, Any]) -> torch.dtype:
    """The dtype of x_T: that of the noise that is given, or what torch.randn draws."""
    noise: Tensor | None = given["noise"]
    return torch.get_default_dtype() if noise is None else noise.dtype
