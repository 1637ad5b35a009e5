"""Small networks with everything the passes look for, on odd shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepfuse.engine.compile.pass_order import PASSES
from stepfuse.engine.compile.runs import has_instructions
from stepfuse.engine.compile.stages import assign
from stepfuse.engine.compile.tracing.trace import Traced, trace
from stepfuse.engine.networks.unet import UNet, UNetConfig

# float32 and bfloat16, where networks are lowered to it
BFLOAT16_LAYERS = has_instructions(torch.device("cpu"), torch.bfloat16)
ONEDNN_DTYPES = [
    None,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not BFLOAT16_LAYERS,
            reason="needs a CPU that computes in bfloat16",
        ),
    ),
]


class Block(nn.Module):
    """A residual block: conditioned by addition or by scale and shift, with dropout and / 1.0."""

    def __init__(self, c_in: int, c_out: int, scale_shift: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.projection = nn.Linear(16, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(2, c_out, eps=1e-3)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        projected = self.projection(F.silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm2(h + projected))
        return (self.shortcut(x) + self.conv2(self.dropout(h))) / 1.0


class Small(nn.Module):
    """Two blocks and a skip connection, (x [N, 3, H, W], t [N]) -> [N, 3, H, W]."""

    def __init__(self, scale_shift: bool = False) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.a = Block(6, 10, scale_shift)
        self.b = Block(16, 6, scale_shift)
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.to(torch.float32)[:, None] * torch.exp(-torch.arange(4) * 0.7)
        embedding = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.first(x)
        deeper = self.a(h, embedding)
        out: Tensor = self.last(self.b(torch.cat([deeper, h], 1), embedding))
        return out


def small(scale_shift: bool = False) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network in evaluation mode and inputs of an odd size."""
    x, t = torch.randn(3, 3, 7, 9), torch.tensor([5, 0, 999])
    return Small(scale_shift).eval(), (x, t)


def own(**options: Any) -> tuple[UNet, tuple[Tensor, Tensor]]:
    """Our U-Net, small, with random weights where it starts at zero."""
    defaults: dict[str, Any] = {
        "base_channels": 16,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "norm_groups": 4,
    }
    model = UNet(UNetConfig(**{**defaults, **options})).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model, (torch.randn(2, 3, 10, 6), torch.tensor([3, 700]))


def conditioned(name: str = "UNet2DConditionModel", **options: Any) -> Any:
    """One of diffusers' U-Nets by its name: two levels of 16 and 32 channels.

    Cross-attention, to [N, tokens, 12], is on the upper level.
    """
    import diffusers

    over = {"UNet2DConditionModel": "2D", "UNet3DConditionModel": "3D"}.get(name, "Motion")
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "down_block_types": (f"CrossAttnDownBlock{over}", f"DownBlock{over}"),
        "up_block_types": (f"UpBlock{over}", f"CrossAttnUpBlock{over}"),
    }
    if over != "Motion":  # which has another word for it
        defaults["attention_head_dim"] = 4
    return getattr(diffusers, name)(**{**defaults, **options}).eval()


def stable_diffusion(**options: Any) -> nn.Module:
    """UNet2DConditionModel with the widths of Stable Diffusion and two of its four levels."""
    widths: dict[str, Any] = {
        "sample_size": 64,
        "block_out_channels": (320, 640),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    unet: nn.Module = conditioned(**{**widths, **options})
    return unet


def traced(function: Any, *inputs: Tensor) -> Traced:
    """The graph of a function or module of some tensors."""

    class Wrapped(nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return function(*args)

    found = trace(function if isinstance(function, nn.Module) else Wrapped(), inputs, {})
    assign(found.gm)
    return found


def only(*names: str) -> list[str]:
    """What to leave out so that only these passes run."""
    return [pass_.__name__ for pass_ in PASSES if pass_.__name__ not in names]


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance, in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())
