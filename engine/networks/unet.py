"""One U-Net for DDPM (Ho et al. 2020) and ADM (Dhariwal and Nichol 2021), chosen by a config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepfuse.engine.networks.unet_blocks import (
    Downsample,
    EmbeddingOrder,
    GroupNormSiLU,
    NoiseVariances,
    Resample,
    ResidualBlock,
    SelfAttention,
    Stage,
    Upsample,
    noise_variance_embedding,
    timestep_embedding,
    zeroed,
)
from stepfuse.engine.sampling.labels import check_range
from stepfuse.engine.sampling.schedule import Schedule

EmbeddingInput = Literal["timestep", "noise_variance"]
MOST_LEVELS = 16  # images of 2^15 pixels a side at the least


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides the shape of a ``UNet``; raises ValueError for what cannot be built.

    Attributes:
        in_channels: image channels C.
        base_channels: width at full resolution.
        channel_multipliers: width of each level over ``base_channels``; each level but the last
            halves the resolution.
        blocks_per_level: residual blocks per level on the way down; one more on the way up.
        attention_factors: self-attention where the resolution is 1/f of the image, for each f.
            The middle always has one.
        head_channels: width of an attention head; None for ``num_heads``.
        num_heads: heads of every attention where ``head_channels`` is None.
        norm_groups: groups of every GroupNorm.
        norm_eps: epsilon of every GroupNorm.
        scale_shift: the embedding scales and shifts the normalised activations (AdaGN); otherwise
            it is added before the norm.
        updown: "conv" resamples by a strided or upsampled convolution, "resblock" in a residual
            block (BigGAN).
        asymmetric_downsample: "conv" pads bottom and right only, as the DDPM paper's code does.
        embedding_order: see ``timestep_embedding``.
        embedding_input: "timestep", or "noise_variance", 1 - abar_t, which `UNet.follow` tells; a
            floating t is the noise variance itself then. See ``noise_variance_embedding``.
        embedding_features: sinusoids of the timestep, ``base_channels`` where None; the embedding
            has four times as many channels as there are sinusoids.
        num_classes: number of classes, or None; the class table has one row more, the null class.
        dropout: probability, in every residual block.
        learned_variance: the output has 2C channels, the second half for the variance.
        residual_rescale: divide every residual sum by sqrt(2).
    """

    in_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    attention_factors: tuple[int, ...] = (2,)
    head_channels: int | None = None
    num_heads: int = 1
    norm_groups: int = 32
    norm_eps: float = 1e-6
    scale_shift: bool = False
    updown: Literal["conv", "resblock"] = "conv"
    asymmetric_downsample: bool = False
    embedding_order: EmbeddingOrder = "sin_cos"
    embedding_input: EmbeddingInput = "timestep"
    embedding_features: int | None = None
    num_classes: int | None = None
    dropout: float = 0.0
    learned_variance: bool = False
    residual_rescale: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "base_channels", "blocks_per_level", "norm_groups"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("base_channels", "embedding_features"):
            width = getattr(self, name)
            _require(
                width is None or (width % 2 == 0 and width >= 4),
                name,
                width,
                "an even number of at least 4",
            )
        _require(
            0 < len(self.channel_multipliers) <= MOST_LEVELS and min(self.channel_multipliers) >= 1,
            "channel_multipliers",
            self.channel_multipliers[: MOST_LEVELS + 1],
            f"a tuple of numbers of at least 1, at most {MOST_LEVELS} of them",
        )
        for channels in self.level_channels:
            _require(
                channels % self.norm_groups == 0,
                "norm_groups",
                self.norm_groups,
                f"a divisor of every level's channels {self.level_channels}",
            )
        possible = tuple(2**level for level in range(len(self.channel_multipliers)))
        _require(
            set(self.attention_factors) <= set(possible),
            "attention_factors",
            self.attention_factors,
            f"a subset of {possible}",
        )
        if self.head_channels is not None:
            for channels in self.attention_channels:
                _require(
                    self.head_channels >= 1 and channels % self.head_channels == 0,
                    "head_channels",
                    self.head_channels,
                    f"None or a divisor of the attention's channels {self.attention_channels}",
                )
        for channels in self.attention_channels:
            _require(
                self.num_heads >= 1 and channels % self.num_heads == 0,
                "num_heads",
                self.num_heads,
                f"a divisor of the attention's channels {self.attention_channels}",
            )
        _require(
            self.num_heads == 1 or self.head_channels is None,
            "num_heads",
            self.num_heads,
            f"1 where head_channels is given ({self.head_channels})",
        )
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        for name, words in (
            ("updown", ("conv", "resblock")),
            ("embedding_order", get_args(EmbeddingOrder)),
            ("embedding_input", get_args(EmbeddingInput)),
        ):
            word = getattr(self, name)
            _require(word in words, name, word, " or ".join(map(repr, words)))
        if self.num_classes is not None:
            _require(self.num_classes >= 1, "num_classes", self.num_classes, "None or at least 1")

    @property
    def out_channels(self) -> int:
        """C, or 2C with a learned variance."""
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def attention_channels(self) -> tuple[int, ...]:
        """Channels of the levels with attention, the last one being the middle's."""
        levels = enumerate(self.level_channels)
        inner = tuple(c for level, c in levels if 2**level in self.attention_factors)
        return (*inner, self.level_channels[-1])

    def heads(self, channels: int) -> int:
        """Heads of an attention over this many channels."""
        return self.num_heads if self.head_channels is None else channels // self.head_channels

    @property
    def size_divisor(self) -> int:
        """Height and width must be multiples of this, 2^(levels - 1)."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @classmethod
    def ddpm_cifar10(cls) -> UNetConfig:
        """The 35.7M network of DDPM for 32x32 images (appendix B)."""
        return cls(dropout=0.1, asymmetric_downsample=True)

    @classmethod
    def adm64(cls) -> UNetConfig:
        """ADM for class-conditional ImageNet at 64x64 (appendix I, 296M)."""
        return cls(
            base_channels=192,
            channel_multipliers=(1, 2, 3, 4),
            blocks_per_level=3,
            attention_factors=(2, 4, 8),
            head_channels=64,
            norm_eps=1e-5,
            scale_shift=True,
            updown="resblock",
            embedding_order="cos_sin",
            num_classes=1000,
            dropout=0.1,
            learned_variance=True,
        )

    @classmethod
    def digits(cls) -> UNetConfig:
        """The network of the embedded checkpoint: 32x32, one channel, ten classes, 1.2M."""
        return cls(
            in_channels=1,
            base_channels=32,
            channel_multipliers=(1, 2, 2),
            blocks_per_level=1,
            attention_factors=(4,),
            norm_groups=8,
            norm_eps=1e-5,
            scale_shift=True,
            num_classes=10,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """The inverse of ``dataclasses.asdict``, with lists (as JSON has them) for tuples."""
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"unknown U-Net options {unknown}; accepted: {sorted(names)}")
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**arguments)


class UNet(nn.Module):
    """The noise-prediction network: (x [N, C, H, W], t [N], labels [N]) -> [N, C or 2C, H, W].

    x_t goes down and up through residual blocks with skip connections by concatenation; each
    block is conditioned on silu(MLP(sinusoid(t)) + class embedding). DDPM appendix B, ADM
    section 3. Any H and W divisible by ``config.size_divisor``.

    Nothing in ``forward`` depends on the value of a tensor: it exports, compiles and captures.
    """

    label_input = "labels"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        base = config.base_channels
        features = config.embedding_features or base
        embedding_channels = 4 * features
        self.conv_in = nn.Conv2d(config.in_channels, base, 3, padding=1)
        self.time_embedding = nn.Sequential(
            nn.Linear(features, embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        noisy = config.embedding_input == "noise_variance"
        self.noise_variances = NoiseVariances() if noisy else None
        self.class_embedding = (
            None
            if config.num_classes is None
            else nn.Embedding(config.num_classes + 1, embedding_channels)
        )

        def block(c_in: int, c_out: int, resample: Resample = "none") -> ResidualBlock:
            return ResidualBlock(
                c_in,
                c_out,
                embedding_channels,
                groups=config.norm_groups,
                eps=config.norm_eps,
                dropout=config.dropout,
                scale_shift=config.scale_shift,
                residual_rescale=config.residual_rescale,
                resample=resample,
            )

        def attention(channels: int) -> SelfAttention:
            return SelfAttention(
                channels,
                heads=config.heads(channels),
                groups=config.norm_groups,
                eps=config.norm_eps,
                residual_rescale=config.residual_rescale,
            )

        def stage(c_in: int, c_out: int, level: int) -> Stage:
            attends = 2**level in config.attention_factors
            return Stage(block(c_in, c_out), attention(c_out) if attends else None)

        last = len(config.level_channels) - 1
        self.down = nn.ModuleList()
        skip_channels = [base]
        width = base
        for level, channels in enumerate(config.level_channels):
            for _ in range(config.blocks_per_level):
                self.down.append(stage(width, channels, level))
                width = channels
                skip_channels.append(width)
            if level != last:
                self.down.append(
                    block(width, width, "down")
                    if config.updown == "resblock"
                    else Downsample(width, config.asymmetric_downsample)
                )
                skip_channels.append(width)

        self.middle = nn.ModuleList(
            [Stage(block(width, width), attention(width)), block(width, width)]
        )

        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(config.level_channels))):
            for _ in range(config.blocks_per_level + 1):
                self.up.append(stage(width + skip_channels.pop(), channels, level))
                width = channels
            if level != 0:
                self.up.append(
                    block(width, width, "up") if config.updown == "resblock" else Upsample(width)
                )

        self.norm_out = GroupNormSiLU(width, config.norm_groups, config.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict from x_t.

        Args:
            x: [N, C, H, W] in the dtype of the weights (or any, under autocast).
            t: [N], integer or floating: index on the training schedule.
            labels: [N] integers in 0..num_classes, num_classes being the null class; None is the
                null class for all. Where an index out of range is no error of PyTorch's (CUDA), the
                range is not checked here, see ``check_labels``.

        Raises:
            ValueError: wrong channels, size, or shape of t or labels, labels out of range.
        """
        self._check_shapes(x, t, labels)
        embedding = F.silu(self.embed(t, labels))
        h: Tensor = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
        h = self.conv_out(self.norm_out(h))
        return h

    def embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """MLP(sinusoid(t)) + class row: [N, 4 base_channels]. The null class is the last row."""
        width = self.config.embedding_features or self.config.base_channels
        if self.noise_variances is None:
            features = timestep_embedding(t, width, self.config.embedding_order)
        else:
            features = noise_variance_embedding(self.noise_variances(t), width)
        embedding: Tensor = self.time_embedding(features.to(self.conv_in.weight.dtype))
        if self.class_embedding is None:
            return embedding
        if labels is None:
            return embedding + self.class_embedding.weight[-1]
        try:
            rows: Tensor = self.class_embedding(labels)
        except IndexError:
            self.check_labels(labels)
            raise
        return embedding + rows

    def follow(self, schedule: Schedule) -> None:
        """Tell a network that is fed noise variances those of its timesteps."""
        if self.noise_variances is not None:
            self.noise_variances.follow(schedule.alphas_cumprod)

    def check_labels(self, labels: Tensor) -> None:
        """Raise unless every label is in 0..num_classes, see `check_range`."""
        check_range(labels, self.config.num_classes, (torch.int64, torch.int32))

    def _check_shapes(self, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        channels, divisor = self.config.in_channels, self.config.size_divisor
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: [N, {channels}, H, W]")
        if x.shape[2] % divisor or x.shape[3] % divisor or 0 in x.shape[2:]:
            raise ValueError(
                f"x has size {tuple(x.shape[2:])}; "
                f"accepted: height and width divisible by {divisor}"
            )
        if t.dim() != 1 or t.shape[0] != x.shape[0]:
            raise ValueError(f"t has shape {tuple(t.shape)}; accepted: [{x.shape[0]}]")
        if labels is None:
            return
        if self.class_embedding is None:
            raise ValueError("labels given, but the network has no classes; accepted: None")
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor or None; got {type(labels).__name__}")
        if labels.dim() != 1 or labels.shape[0] != x.shape[0]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; accepted: [{x.shape[0]}]")


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}")
