"""Building blocks of the U-Net: timestep embedding, residual block, self-attention, resampling.

Every block is called as ``block(x, embedding)`` with x [N, C, H, W] and the activated embedding
[N, E], so that the network in ``unet.py`` is three flat loops. Every GroupNorm goes through the
fused operation ``group_norm_silu``.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepfuse.kernels.group_norm_silu import group_norm_silu

EmbeddingOrder = Literal["sin_cos", "cos_sin"]
Resample = Literal["none", "down", "up"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def timestep_embedding(t: Tensor, channels: int, order: EmbeddingOrder) -> Tensor:
    """Sinusoidal features of the timestep, float32 [N, channels].

    With half = channels / 2 and k = 0..half-1 the angles are t * 10000^(-k / d), where

    - ``"sin_cos"``: d = half - 1, sines first (DDPM, Ho et al. 2020, appendix B);
    - ``"cos_sin"``: d = half, cosines first (ADM, Dhariwal and Nichol 2021; latent diffusion).

    Args:
        t: timesteps [N], integer or floating.
        channels: even number of features.
    """
    half = channels // 2
    divisor = half - 1 if order == "sin_cos" else half
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(k * (-math.log(10000.0) / divisor))
    angles = t.to(torch.float32)[:, None] * frequencies[None, :]
    if order == "sin_cos":
        return torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def noise_variance_embedding(variance: Tensor, channels: int) -> Tensor:
    """Sinusoidal features of the noise variance, float32 [N, channels] (Keras' DDIM example).

    With half = channels / 2, sines first, the angles are 2 pi f variance for half frequencies f
    from 1 to 1000 in equal ratios.

    Args:
        variance: [N], floating, in [0, 1].
        channels: even number of features.
    """
    powers = torch.linspace(0, math.log(1000.0), channels // 2, device=variance.device)
    angles = variance.to(torch.float32)[:, None] * (2 * math.pi * torch.exp(powers))[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class NoiseVariances(nn.Module):
    """1 - abar_t, float32 [N], of the schedule that it follows, for integers t [N].

    A floating t is the noise variance itself. The numbers are kept as integers, 2^40 to 1: a
    network that is cast to half precision would lose them.
    """

    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", None, persistent=False)  # a checkpoint has the schedule

    def follow(self, alphas_cumprod: Tensor) -> None:
        """Take over the numbers of a schedule, float64 [T]."""
        table = ((1 - alphas_cumprod) * _ONE).round().to(torch.int64)
        self.table = table if self.table is None else table.to(self.table.device)

    def forward(self, t: Tensor) -> Tensor:
        """The noise variance at t."""
        if t.is_floating_point():
            return t
        if self.table is None:
            raise RuntimeError("the network knows no noise variances yet: call follow(schedule)")
        return self.table.index_select(0, t).to(torch.float32) / _ONE


_ONE = float(2**40)


class GroupNormSiLU(nn.Module):
    """act((1 + scale) * GroupNorm(x + add) + shift), act being SiLU or the identity."""

    def __init__(
        self, channels: int, groups: int, eps: float, act: Literal["silu", "none"] = "silu"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups = groups
        self.eps = eps
        self.act: Literal["silu", "none"] = act

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        """x [N, C, ...] and per-sample, per-channel scale, shift and add [N, C] or None."""
        return group_norm_silu(
            x,
            self.weight,
            self.bias,
            self.groups,
            eps=self.eps,
            scale=scale,
            shift=shift,
            add=add,
            act=self.act,
        )


class ResidualBlock(nn.Module):
    """The residual block of DDPM and ADM, optionally resampling by two (BigGAN style).

    h = conv1(resample(silu(norm1(x)))), then with p = Linear(embedding):

    - additive: h = silu(norm2(h + p));
    - scale-shift (AdaGN, ADM section 3): (s, b) = p, h = silu((1 + s) norm2(h) + b);

    and the result is shortcut(resample(x)) + conv2(dropout(h)), divided by sqrt(2) with
    ``residual_rescale``. conv2 starts at zero, so that the block starts as its shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        residual_rescale: bool,
        resample: Resample = "none",
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(in_channels, groups, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.projection = nn.Linear(
            embedding_channels, 2 * out_channels if scale_shift else out_channels
        )
        self.norm2 = GroupNormSiLU(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )
        self.scale_shift = scale_shift
        self.residual_rescale = residual_rescale
        self.resample: Resample = resample

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [N, C_in, H, W], embedding [N, E] -> [N, C_out, H', W']."""
        h = self.norm1(x)
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x, h = double_size(x), double_size(h)
        h = self.conv1(h)
        projected = self.projection(embedding)
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, add=projected)
        y: Tensor = self.shortcut(x) + self.conv2(self.dropout(h))
        return y * math.sqrt(0.5) if self.residual_rescale else y


class SelfAttention(nn.Module):
    """x + W_o softmax(q k^T / sqrt(d)) v over the H * W positions of GroupNorm(x).

    d is the channels of one of ``heads`` heads (ADM section 3 settles on 64). W_o starts at zero.
    The rows of ``qkv`` are all queries, then all keys, then all values.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        groups: int,
        eps: float,
        residual_rescale: bool,
    ) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(channels, groups, eps, act="none")
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.heads = heads
        self.residual_rescale = residual_rescale

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H, W]."""
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, c // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, HW, d]
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = self.out(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + mixed.transpose(1, 2).reshape(n, c, height, width)
        return y * math.sqrt(0.5) if self.residual_rescale else y


class Stage(nn.Module):
    """A residual block, followed by self-attention where the resolution asks for it."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [N, C_in, H, W], embedding [N, E] -> [N, C_out, H, W]."""
        h: Tensor = self.block(x, embedding)
        return h if self.attention is None else self.attention(h)


class Downsample(nn.Module):
    """3x3 convolution of stride 2: [N, C, H, W] -> [N, C, H/2, W/2].

    ``asymmetric`` pads one row and column at the bottom and right only, as TensorFlow's SAME
    padding does in the DDPM paper's code; otherwise one on each side.
    """

    def __init__(self, channels: int, asymmetric: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)
        self.asymmetric = asymmetric

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The embedding is not used."""
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return y


class Upsample(nn.Module):
    """Nearest neighbour and a 3x3 convolution: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The embedding is not used."""
        y: Tensor = self.conv(double_size(x))
        return y


def double_size(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by two."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def zeroed(module: ModuleT) -> ModuleT:
    """The same module with all its parameters at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
