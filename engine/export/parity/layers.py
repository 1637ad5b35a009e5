"""Which layer of a candidate is wrong.

Errors add up on the way through a network, so that the first layer over a threshold is rarely the
guilty one. Here the reference runs once more, and after every layer its result is replaced by the
candidate's. So each layer sees what the candidate's layer saw, and the difference of the two
results is what this layer alone has added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.export.parity.compare import Deviation, LayerDeviation
from stepfuse.engine.export.parity.onnx_nodes import OnnxProbe


def compare_layers(
    reference: nn.Module,
    candidate: OnnxProbe | nn.Module,
    x: Tensor,
    t: Tensor,
    condition: Mapping[str, Tensor],
    constants: Mapping[str, Any],
) -> list[LayerDeviation]:
    """Every layer that both have, the one that adds most first.

    Layers are modules without children that run once; ``reference`` computes in float64.
    """
    floats = {k: v.double() if v.is_floating_point() else v for k, v in condition.items()}
    named = {**floats, **constants}
    own = _outputs(reference, x.double(), t, named)
    theirs = _candidate_outputs(candidate, list(own), x, t, condition, constants)
    theirs = {
        name: value.double()
        for name, value in theirs.items()
        if name in own and value.shape == own[name].shape
    }
    found: list[LayerDeviation] = []

    def replace(name: str, output: Tensor) -> Tensor | None:
        if name not in theirs:
            return None
        local = Deviation.of(theirs[name], output).relative_l2
        total = Deviation.of(theirs[name], own[name]).relative_l2
        found.append(LayerDeviation(name, local, total))
        return theirs[name]

    with torch.no_grad(), _watching(reference, replace):
        reference(x.double(), t, **named)
    return sorted(found, key=lambda layer: -layer.local)


def _candidate_outputs(
    candidate: OnnxProbe | nn.Module,
    layers: list[str],
    x: Tensor,
    t: Tensor,
    condition: Mapping[str, Tensor],
    constants: Mapping[str, Any],
) -> dict[str, Tensor]:
    if isinstance(candidate, nn.Module):
        return _outputs(candidate, x, t, {**condition, **constants})
    values = candidate.layer_values(layers)
    inputs = {**dict(zip(candidate.inputs, (x, t), strict=False)), **condition}
    tensors = candidate.values(values.values(), inputs)
    return {layer: tensors[value] for layer, value in values.items()}


def _outputs(model: nn.Module, x: Tensor, t: Tensor, named: Mapping[str, Any]) -> dict[str, Tensor]:
    """What every layer that runs exactly once returns."""
    outputs: dict[str, Tensor] = {}
    again: set[str] = set()

    def keep(name: str, output: Tensor) -> None:
        if name in outputs:
            again.add(name)
        outputs[name] = output

    weights = [p for p in model.parameters() if p.is_floating_point()]
    with torch.no_grad(), _watching(model, keep):
        model(x.to(weights[0].dtype) if weights else x, t, **named)
    return {name: value for name, value in outputs.items() if name not in again}


@contextlib.contextmanager
def _watching(model: nn.Module, seen: Any) -> Iterator[None]:
    """Inside, ``seen(name, output)`` is called after every module without children."""

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return seen(name, output) if isinstance(output, Tensor) else None

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
