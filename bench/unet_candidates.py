"""What `bench_unet` evaluates, and by which name each way to evaluate it is built."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.bench.diffusers_twin import diffusers_twin
from stepfuse.bench.networks import Plain, cifar10, from_config
from stepfuse.bench.peers import PEERS, Call
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.weights.watched import Holding

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
_HOLDINGS: dict[str, Holding] = {"": "parked", "-kept": "kept", "-released": "released"}
# ours by name: its dtype, and what becomes of weights that were packed
OURS: dict[str, tuple[str, Holding]] = {
    f"stepfuse-{dtype}{ending}": (dtype, holding)
    for dtype in PRECISIONS
    for ending, holding in _HOLDINGS.items()
}
# relative L2 to eager float32: sums in another order, and rounding to 8 bits through 60 layers
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2}
TIMESTEP = 500


def network(
    name: str, config: dict[str, Any] | None, batch: int
) -> tuple[nn.Module, tuple[int, ...]]:
    """(``model(x, t)`` with a tensor for its result, the shape of its x).

    "digits" is diffusers' twin of the embedded checkpoint, every class in turn.
    """
    if config is None and name == "digits":
        checkpoint = sf.load("digits")
        labels = torch.arange(batch) % (checkpoint.num_classes or 1)
        twin = diffusers_twin(checkpoint.model)
        return Plain(twin, {"class_labels": labels}), (batch, *checkpoint.sample_shape)
    unet: Any = cifar10() if config is None else from_config(config)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Plain(unet), (batch, unet.config.in_channels, height, width)


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x and t."""
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator), torch.full(shape[:1], TIMESTEP)


def maker(name: str, model: nn.Module, x: Tensor, t: Tensor) -> Callable[[], Call]:
    """What builds the candidate of this name; RuntimeError where it cannot run here."""
    if name in OURS:
        dtype, weights = PRECISIONS[OURS[name][0]], OURS[name][1]
        timesteps = [*sf.spaced_timesteps(1000, 50), TIMESTEP]
        return lambda: optimize(model, (x, t), dtype, timesteps=timesteps, weights=weights)
    peer = next(peer for peer in PEERS if peer.name == name)
    reason = peer.why_not()
    if reason:
        raise RuntimeError(reason)
    return lambda: peer.build(model, x, t)


def import_packages(name: str) -> None:
    """Import what the candidate needs, so that it does not count as the candidate's own memory."""
    for package in next((peer.needs for peer in PEERS if peer.name == name), ()):
        importlib.import_module(package)
