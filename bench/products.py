"""The matrix products of a network, timed alone: its convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

mkldnn = torch.ops.mkldnn


def products(
    model: nn.Module, x: Tensor, t: Tensor, dtype: torch.dtype | None
) -> Callable[[], None]:
    """A function that runs every convolution and linear layer once.

    Shapes are those of ``model(x, t)``; weights are packed by oneDNN, images channels-last. Linear
    layers on vectors [N, C] (the time embedding) are not counted: they can be tabulated. Each has
    been run once when this returns: RuntimeError where oneDNN lacks one in ``dtype`` on this CPU.
    """
    calls: list[Callable[[], Any]] = []
    dtype = dtype or torch.float32

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            calls.append(_convolution(module, inputs[0].to(dtype), dtype))
        elif isinstance(module, nn.Linear) and inputs[0].dim() > 2:
            calls.append(_linear(module, inputs[0].to(dtype), dtype))

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(x, t)
    finally:
        for hook in hooks:
            hook.remove()

    def run() -> None:
        for call in calls:
            call()

    run()
    return run


def _convolution(module: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    geometry = [list(g) for g in (module.padding, module.stride, module.dilation)]
    image = x.contiguous(memory_format=torch.channels_last)
    weight = mkldnn._reorder_convolution_weight(
        module.weight.detach().to(dtype), *geometry, module.groups, list(x.shape)
    )
    bias = None if module.bias is None else module.bias.detach()
    call = mkldnn._convolution_pointwise.default
    return lambda: call(image, weight, bias, *geometry, module.groups, "none", [], "")


def _linear(module: nn.Linear, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    rows = x.contiguous()
    weight = mkldnn._reorder_linear_weight(module.weight.detach().to(dtype), x.shape[:-1].numel())
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    call = mkldnn._linear_pointwise.default
    return lambda: call(rows, weight, bias, "none", [], "")
