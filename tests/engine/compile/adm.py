"""A U-Net written the way OpenAI's guided diffusion writes it: other operators for the same things.

Norms that go through float32, scale and shift by `chunk`, attention by two einsums over [N, C, T]
with conv1d projections, resampling inside residual blocks, a class embedding, cos before sin.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FloatNorm(nn.GroupNorm):
    """GroupNorm whose arithmetic is float32 whatever the image is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def norm(channels: int) -> FloatNorm:
    return FloatNorm(4, channels)


def embedded(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of t at width // 2 frequencies from 1 down to 1/10000."""
    half = width // 2
    steps = torch.arange(start=0, end=half, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10000) * steps / half).to(device=t.device)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class Resample(nn.Module):
    """Nearest enlargement or averages of 2x2, without weights."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.avg_pool2d(x, 2)


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice; conditioned in between; resampled before the first one."""

    def __init__(
        self, c_in: int, c_out: int, width: int, scale_shift: bool, resample: str = ""
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.into = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.resample = Resample(resample == "up") if resample else None
        self.emb = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if scale_shift else 1) * c_out))
        self.out = nn.Sequential(
            norm(c_out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample is not None:
            h = self.into[-1](self.resample(self.into[:-1](x)))
            x = self.resample(x)
        else:
            h = self.into(x)
        projected = self.emb(emb).type(h.dtype)
        while len(projected.shape) < len(h.shape):
            projected = projected[..., None]
        if self.scale_shift:
            scale, shift = torch.chunk(projected, 2, dim=1)
            h = self.out[1:](self.out[0](h) * (1 + scale) + shift)
        else:
            h = self.out(h + projected)
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """Self-attention on [N, C, T]; ``legacy`` splits heads before q, k and v."""

    def __init__(self, channels: int, heads: int, legacy: bool) -> None:
        super().__init__()
        self.heads, self.legacy = heads, legacy
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, *spatial = x.shape
        x = x.reshape(n, c, -1)
        qkv = self.qkv(self.norm(x))
        d = c // self.heads
        if self.legacy:
            q, k, v = qkv.reshape(n * self.heads, 3 * d, -1).split(d, dim=1)
        else:
            q, k, v = (part.reshape(n * self.heads, d, -1) for part in qkv.chunk(3, dim=1))
        s = 1 / math.sqrt(math.sqrt(d))
        logits = torch.einsum("bct,bcs->bts", q * s, k * s)
        weights = torch.softmax(logits.float(), dim=-1).type(logits.dtype)
        a = torch.einsum("bts,bcs->bct", weights, v)
        h: Tensor = self.out(a.reshape(n, -1, a.shape[-1]))
        return (x + h).reshape(n, c, *spatial)


class Layers(nn.Sequential):
    """A sequence whose residual blocks are given the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, Residual) else layer(x)
        return x


class ADM(nn.Module):
    """Two levels: (x [N, 3, H, W], timesteps [N], y=None) -> [N, 6, H, W]."""

    def __init__(
        self,
        scale_shift: bool = True,
        legacy: bool = True,
        classes: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        c, width = 16, 64
        self.c, self.dtype = c, dtype
        self.time = nn.Sequential(nn.Linear(c, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if classes is None else nn.Embedding(classes, width)
        block: Any = lambda a, b, r="": Residual(a, b, width, scale_shift, r)  # noqa: E731
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList(
            [
                Layers(block(c, c)),
                Layers(block(c, c, "down")),
                Layers(block(c, 2 * c), Attention(2 * c, 2, legacy)),
            ]
        )
        self.middle = Layers(block(2 * c, 2 * c), Attention(2 * c, 2, legacy), block(2 * c, 2 * c))
        self.up = nn.ModuleList(
            [
                Layers(block(4 * c, 2 * c), Attention(2 * c, 2, legacy)),
                Layers(block(3 * c, 2 * c), block(2 * c, 2 * c, "up")),
                Layers(block(3 * c, c)),
                Layers(block(2 * c, c)),
            ]
        )
        self.last = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, 6, 3, padding=1))
        for part in (self.down, self.middle, self.up):
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)  # norms and projections of the embedding stay float32

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time(embedded(timesteps, self.c))
        if self.label is not None:
            assert y is not None
            emb = emb + self.label(y)
        h = self.first(x).type(self.dtype)
        skips = [h]
        for layers in self.down:
            h = layers(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for layers in self.up:
            h = layers(torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.last(h.type(x.dtype))
        return out
