"""OpenAI's U-Net as a list of layers and a state dict with its published names: no modules.

Written from the ADM paper (Dhariwal and Nichol 2021, section 3) and the names in the checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32


@dataclass
class ADM:
    """The settings; ``layers`` and ``weights`` are made from them, the weights at random."""

    width: int = 32
    multipliers: tuple[float, ...] = (1, 2)
    blocks: int = 1
    factors: tuple[int, ...] = (2,)
    head_channels: int | None = 16
    heads: int = 1
    scale_shift: bool = True
    updown: bool = True
    classes: int | None = None
    channels: int = 3
    learned: bool = True
    new_order: bool = False
    seed: int = 0
    layers: list[list[tuple[str, str]]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.embedding = 4 * self.width
        self.affine("time_embed.0", self.embedding, self.width)
        self.affine("time_embed.2", self.embedding, self.embedding)
        if self.classes is not None:
            self.weights["label_emb.weight"] = self.draw(self.classes, self.embedding)
        widths = [int(m * self.width) for m in self.multipliers]
        now, skips = widths[0], [widths[0]]
        self.affine("input_blocks.0.0", now, self.channels, 3, 3)
        self.layers.append([("conv", "input_blocks.0.0")])
        for level, width in enumerate(widths):
            for _ in range(self.blocks):
                self.stage(f"input_blocks.{len(self.layers)}", now, width, level)
                now = width
                skips.append(now)
            if level + 1 < len(widths):
                name = f"input_blocks.{len(self.layers)}.0"
                self.layers.append([self.resampling(name, now, "down")])
                skips.append(now)
        self.turn = len(self.layers)
        middle = [self.residual("middle_block.0", now, now), self.attention("middle_block.1", now)]
        self.layers.append([*middle, self.residual("middle_block.2", now, now)])
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.blocks + 1):
                name = f"output_blocks.{len(self.layers) - self.turn - 1}"
                self.stage(name, now + skips.pop(), width, level)
                now = width
                if level and i == self.blocks:
                    last = self.layers[-1]
                    last.append(self.resampling(f"{name}.{len(last)}", now, "up"))
        self.affine("out.0", now)
        self.affine("out.2", self.channels * (2 if self.learned else 1), now, 3, 3)

    def draw(self, *shape: int) -> Tensor:
        fan = math.prod(shape[1:]) if len(shape) > 1 else 4
        return torch.randn(shape, generator=self.random) / math.sqrt(fan)

    def affine(self, name: str, *shape: int) -> None:
        self.weights[f"{name}.weight"] = self.draw(*shape) + (1.0 if len(shape) == 1 else 0.0)
        self.weights[f"{name}.bias"] = self.draw(shape[0])

    def stage(self, name: str, before: int, after: int, level: int) -> None:
        layers = [self.residual(f"{name}.0", before, after)]
        if 2**level in self.factors:
            layers.append(self.attention(f"{name}.1", after))
        self.layers.append(layers)

    def residual(self, name: str, before: int, after: int) -> tuple[str, str]:
        self.affine(f"{name}.in_layers.0", before)
        self.affine(f"{name}.in_layers.2", after, before, 3, 3)
        projected = 2 * after if self.scale_shift else after
        self.affine(f"{name}.emb_layers.1", projected, self.embedding)
        self.affine(f"{name}.out_layers.0", after)
        self.affine(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            self.affine(f"{name}.skip_connection", after, before, 1, 1)
        return "residual", name

    def attention(self, name: str, width: int) -> tuple[str, str]:
        self.affine(f"{name}.norm", width)
        self.affine(f"{name}.qkv", 3 * width, width, 1)
        self.affine(f"{name}.proj_out", width, width, 1)
        return "attention", name

    def resampling(self, name: str, width: int, direction: str) -> tuple[str, str]:
        if self.updown:
            return direction, self.residual(name, width, width)[1]
        self.affine(f"{name}.{'op' if direction == 'down' else 'conv'}", width, width, 3, 3)
        return f"conv {direction}", name

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.width // 2
        angles = t[:, None].float() * 10000 ** (-torch.arange(half) / half)
        embedding = self.apply("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
        embedding = self.apply("time_embed.2", F.silu(embedding))
        if y is not None:
            embedding = embedding + self.weights["label_emb.weight"][y]
        kept: list[Tensor] = []
        for place, layers in enumerate(self.layers):
            if place > self.turn:
                x = torch.cat([x, kept.pop()], dim=1)
            for kind, name in layers:
                x = self.layer(kind, name, x, F.silu(embedding))
            if place < self.turn:
                kept.append(x)
        return self.apply("out.2", F.silu(self.norm("out.0", x)), 1)

    def layer(self, kind: str, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        if kind == "conv":
            return self.apply(name, x, 1)
        if kind == "conv down":
            return self.apply(f"{name}.op", x, 1, 2)
        if kind == "conv up":
            return self.apply(f"{name}.conv", self.twice(x), 1)
        if kind == "attention":
            return x + self.attend(name, x)
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if kind == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif kind == "up":
            x, h = self.twice(x), self.twice(h)
        h = self.apply(f"{name}.in_layers.2", h, 1)
        projected = self.apply(f"{name}.emb_layers.1", embedding)[..., None, None]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + projected)
        h = self.apply(f"{name}.out_layers.3", F.silu(h), 1)
        skip = f"{name}.skip_connection"
        return h + (self.apply(skip, x) if f"{skip}.weight" in self.weights else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        heads = self.heads if self.head_channels is None else c // self.head_channels
        qkv = self.apply(f"{name}.qkv", self.norm(f"{name}.norm", x).flatten(2))
        if self.new_order:
            q, k, v = (part.reshape(n * heads, c // heads, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(n * heads, 3 * c // heads, -1).chunk(3, dim=1)
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(c // heads), dim=-1)
        mixed = (v @ weight.transpose(1, 2)).reshape(n, c, -1)
        return self.apply(f"{name}.proj_out", mixed).reshape(n, c, height, width)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(
            x, GROUPS, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5
        )

    def apply(self, name: str, x: Tensor, padding: int = 0, stride: int = 1) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        if weight.dim() == 3:
            return F.conv1d(x, weight, bias)
        return F.conv2d(x, weight, bias, stride=stride, padding=padding)

    def twice(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
