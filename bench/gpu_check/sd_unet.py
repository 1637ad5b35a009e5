"""A U-Net of the shape of Stable Diffusion 1.5's, in plain PyTorch, with random weights.

    e   = Linear(silu(Linear([cos, sin](t))))                                  [N, 4 c_0]
    ResidualBlock    h + Conv(silu(GN(Conv(silu(GN(h))) + Linear(silu(e)))))
    Transformer      h + Conv1(blocks(Conv1(GN(h)))); a block adds attention of the tokens to
                     themselves, attention to the text, and a GEGLU feed-forward, each after a
                     LayerNorm

Rombach et al. 2022, sections 3.2 and 3.3. Transformers stand on all levels but the last, and in the
middle. With the default configuration it has as many parameters as Stable Diffusion 1.5's U-Net.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 77  # of a text


@dataclass(frozen=True)
class Shape:
    """Sizes of the network.

    Args:
        channels: of every level, each half as wide and high as the one before it.
        blocks: residual blocks of a level on the way down; one more on the way up.
        heads: of every attention.
        context: width of the text, [N, tokens, context].
        groups: of every GroupNorm.
        latents: channels of x.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    heads: int = 8
    context: int = 768
    groups: int = 32
    latents: int = 4


TINY = Shape(channels=(8, 16), blocks=1, heads=2, context=12, groups=4)


class ResidualBlock(nn.Module):
    """[N, c_in, H, W] and the embedded timestep to [N, c_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, c_in)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(embedding, c_out)
        self.norm_out = nn.GroupNorm(groups, c_out)
        self.conv_out = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.time(F.silu(embedding))[:, :, None, None]
        h = self.conv_out(F.silu(self.norm_out(h)))
        result: Tensor = self.shortcut(x) + h
        return result


class Attention(nn.Module):
    """Tokens [N, L, width] attend to ``source`` [N, S, source_width]."""

    def __init__(self, width: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(source_width, width, bias=False)
        self.value = nn.Linear(source_width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        count, length, width = x.shape

        def split(tokens: Tensor) -> Tensor:
            return tokens.view(count, -1, self.heads, width // self.heads).transpose(1, 2)

        h = F.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(source)), split(self.value(source))
        )
        result: Tensor = self.out(h.transpose(1, 2).reshape(count, length, width))
        return result


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): W_2 (a gelu(b)) with (a, b) = W_1 x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.gate(x).chunk(2, dim=-1)
        result: Tensor = self.out(value * F.gelu(gate))
        return result


class Transformer(nn.Module):
    """[N, C, H, W] and the text to [N, C, H, W]."""

    def __init__(self, channels: int, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(shape.groups, channels, eps=1e-6)
        self.enter = nn.Conv2d(channels, channels, 1)
        self.norm_self = nn.LayerNorm(channels)
        self.attend_self = Attention(channels, channels, shape.heads)
        self.norm_text = nn.LayerNorm(channels)
        self.attend_text = Attention(channels, shape.context, shape.heads)
        self.norm_feed = nn.LayerNorm(channels)
        self.feed = FeedForward(channels)
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        h = self.enter(self.norm(x))
        tokens = h.permute(0, 2, 3, 1).reshape(count, height * width, channels)
        normed = self.norm_self(tokens)
        tokens = tokens + self.attend_self(normed, normed)
        tokens = tokens + self.attend_text(self.norm_text(tokens), text)
        tokens = tokens + self.feed(self.norm_feed(tokens))
        h = tokens.reshape(count, height, width, channels).permute(0, 3, 1, 2)
        result: Tensor = x + self.leave(h)
        return result


class Stage(nn.Module):
    """A residual block, and a transformer where there is one."""

    def __init__(self, c_in: int, c_out: int, attends: bool, shape: Shape) -> None:
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, 4 * shape.channels[0], shape.groups)
        self.transformer = Transformer(c_out, shape) if attends else None

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor) -> Tensor:
        h: Tensor = self.block(x, embedding)
        if self.transformer is not None:
            h = self.transformer(h, text)
        return h


class SDUNet(nn.Module):
    """``model(x, t, encoder_hidden_states)`` to the predicted noise.

    x [N, latents, H, W] with H and W divisible by 2^(levels - 1), t int64 [N], the text
    [N, tokens, context]; the result is like x, and everything has the dtype of the weights.
    """

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        first, levels = shape.channels[0], len(shape.channels)
        self.embed_in = nn.Linear(first, 4 * first)
        self.embed_out = nn.Linear(4 * first, 4 * first)
        self.enter = nn.Conv2d(shape.latents, first, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        c, skips = first, [first]
        for level, channels in enumerate(shape.channels):
            last = level == levels - 1
            for _ in range(shape.blocks):
                self.down.append(Stage(c, channels, not last, shape))
                c = channels
                skips.append(c)
            if not last:
                self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle_in = Stage(c, c, True, shape)
        self.middle_out = Stage(c, c, False, shape)
        self.up, self.enlarge = nn.ModuleList(), nn.ModuleList()
        for level, channels in reversed(list(enumerate(shape.channels))):
            for _ in range(shape.blocks + 1):
                self.up.append(Stage(c + skips.pop(), channels, level < levels - 1, shape))
                c = channels
            if level:
                self.enlarge.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm = nn.GroupNorm(shape.groups, c)
        self.leave = nn.Conv2d(c, shape.latents, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text, blocks = encoder_hidden_states, self.shape.blocks
        embedding = sinusoids(t, self.shape.channels[0]).to(x.dtype)
        embedding = self.embed_out(F.silu(self.embed_in(embedding)))
        h = self.enter(x)
        skips = [h]
        for number, stage in enumerate(self.down, 1):
            h = stage(h, embedding, text)
            skips.append(h)
            if number % blocks == 0 and number < len(self.down):
                h = self.shrink[number // blocks - 1](h)
                skips.append(h)
        h = self.middle_out(self.middle_in(h, embedding, text), embedding, text)
        for number, stage in enumerate(self.up, 1):
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, text)
            if number % (blocks + 1) == 0 and number < len(self.up):
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = self.enlarge[number // (blocks + 1) - 1](h)
        result: Tensor = self.leave(F.silu(self.norm(h)))
        return result


def sinusoids(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of t 10000^(-i / half), i = 0 .. half - 1, float32 [N, width]."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.to(torch.float32)[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> SDUNet:
    """The network in evaluation mode without gradients, drawn on ``device`` in ``dtype``."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = SDUNet(shape)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def inputs(
    shape: Shape, batch: int, side: int, device: torch.device, dtype: torch.dtype, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """x [batch, latents, side, side], t and the text, drawn on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, shape.latents, side, side, generator=generator, device=device)
    text = torch.randn(batch, TOKENS, shape.context, generator=generator, device=device)
    t = torch.full((batch,), 500, device=device)
    return x.to(dtype), t, text.to(dtype)
