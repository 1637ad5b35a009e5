"""Networks that are timed, as what runs them wants to call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def cifar10() -> nn.Module:
    """diffusers' network in the size of DDPM for CIFAR-10: 35.7M, random weights."""
    return from_config(
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
        }
    )


def from_config(config: dict[str, Any]) -> nn.Module:
    """diffusers' UNet2DModel of a configuration, as its config.json holds it."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    network: nn.Module = UNet2DModel(**given).eval().requires_grad_(False)
    return network


class Plain(nn.Module):
    """``model(x, t)`` with a tensor for its result, as runtimes of two inputs want it.

    ``condition`` are further arguments of ``model``, which are held inside.
    """

    def __init__(self, model: nn.Module, condition: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        condition = condition or {}
        self.names = tuple(condition)
        for name, value in condition.items():
            self.register_buffer(f"given_{name}", value, persistent=False)
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result = self.model(x, t, **{n: getattr(self, f"given_{n}") for n in self.names})
        tensor: Tensor = result if isinstance(result, Tensor) else result.sample
        return tensor
