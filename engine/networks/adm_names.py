"""The names of OpenAI's U-Net checkpoints: which network they describe, and where each goes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from stepfuse.engine.networks.adm_flags import network_options
from stepfuse.engine.networks.unet import UNetConfig

# one residual block, one attention: theirs on the left
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "projection",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "shortcut",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj_out": "out"}
_ENDS = {
    "time_embed.0": "time_embedding.0",
    "time_embed.2": "time_embedding.2",
    "input_blocks.0.0": "conv_in",
    "out.0": "norm_out",
    "out.2": "conv_out",
}
LABELS = "label_emb.weight"


def inferred(
    weights: Mapping[str, Tensor], head_channels: int | None, num_heads: int
) -> UNetConfig:
    """The network that a checkpoint's names and shapes describe; heads leave no trace in them.

    Raises ValueError, with the name, where one that every such checkpoint has is missing.
    """
    count = 1 + max((_index(name, "output_blocks") for name in weights), default=-1)
    ups = [k for k in range(count) if _has_up(weights, k)]
    levels, blocks = len(ups) + 1, (ups[0] if ups else count - 1)
    if blocks < 1 or count != levels * (blocks + 1):
        raise ValueError(
            f"the checkpoint has {count} output_blocks and {len(ups)} that resample, which no "
            "U-Net of OpenAI's has; accepted: state dicts of its UNetModel"
        )
    firsts = [f"output_blocks.{(blocks + 1) * (levels - 1 - i)}" for i in range(levels)]
    channels = [_shape(weights, f"{first}.0.in_layers.2.weight")[0] for first in firsts]
    first_conv, out_conv = (
        _shape(weights, f"{name}.weight") for name in ("input_blocks.0.0", "out.2")
    )
    image_channels, out_channels = first_conv[1], out_conv[0]
    if len(first_conv) != 4:
        raise ValueError(f"input_blocks.0.0.weight has shape {first_conv}; accepted: 4 dimensions")
    if out_channels not in (image_channels, 2 * image_channels) or image_channels == 6:
        raise ValueError(
            f"the network takes {image_channels} channels and gives {out_channels}; accepted: as "
            "many, or twice as many. Super-resolution networks, which also take the small image, "
            "are not supported"
        )
    embedding = _shape(weights, f"{firsts[0]}.0.emb_layers.1.weight")[0]
    labels = weights.get(LABELS)
    return UNetConfig(
        in_channels=image_channels,
        **network_options(channels, _shape(weights, "time_embed.0.weight")[1]),
        blocks_per_level=blocks,
        attention_factors=tuple(
            2**level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in weights
        ),
        head_channels=head_channels,
        num_heads=num_heads,
        scale_shift=embedding == 2 * channels[0],
        updown="conv" if any(name.endswith(".0.op.weight") for name in weights) else "resblock",
        num_classes=None if labels is None else labels.shape[0],
        learned_variance=out_channels == 2 * image_channels,
    )


def pairs(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(theirs, ours) of every weight of the network, but for the classes."""
    yield from _with_leaves(_ENDS.items())
    last = len(config.level_channels) - 1
    place = 0
    for level in range(last + 1):
        for _ in range(config.blocks_per_level):
            yield from _stage(f"input_blocks.{place + 1}", f"down.{place}", config, level)
            place += 1
        if level != last:
            yield from _resample(f"input_blocks.{place + 1}.0", f"down.{place}", config, "op")
            place += 1
    for k, (name, layers) in enumerate(
        (("middle.0.block", _RESIDUAL), ("middle.0.attention", _ATTENTION), ("middle.1", _RESIDUAL))
    ):
        yield from _layers(f"middle_block.{k}", name, layers)
    theirs = ours = 0
    for level in range(last, -1, -1):
        attends = 2**level in config.attention_factors
        for i in range(config.blocks_per_level + 1):
            yield from _stage(f"output_blocks.{theirs}", f"up.{ours}", config, level)
            ours += 1
            if level and i == config.blocks_per_level:
                up = f"output_blocks.{theirs}.{2 if attends else 1}"
                yield from _resample(up, f"up.{ours}", config, "conv")
                ours += 1
            theirs += 1


def _stage(theirs: str, ours: str, config: UNetConfig, level: int) -> Iterator[tuple[str, str]]:
    yield from _layers(f"{theirs}.0", f"{ours}.block", _RESIDUAL)
    if 2**level in config.attention_factors:
        yield from _layers(f"{theirs}.1", f"{ours}.attention", _ATTENTION)


def _resample(theirs: str, ours: str, config: UNetConfig, conv: str) -> Iterator[tuple[str, str]]:
    if config.updown == "resblock":
        yield from _layers(theirs, ours, _RESIDUAL)
    else:
        yield from _layers(theirs, ours, {conv: "conv"})


def _layers(theirs: str, ours: str, layers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    named = ((f"{theirs}.{left}", f"{ours}.{right}") for left, right in layers.items())
    return _with_leaves(named)


def _with_leaves(layers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for theirs, ours in layers:
        for leaf in ("weight", "bias"):
            yield f"{theirs}.{leaf}", f"{ours}.{leaf}"


def _index(name: str, group: str) -> int:
    found = re.match(rf"{group}\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _has_up(weights: Mapping[str, Tensor], k: int) -> bool:
    """Whether output block k resamples: it has a second residual block, or a convolution."""
    return any(
        f"output_blocks.{k}.{i}.{layer}.weight" in weights
        for i in (1, 2)
        for layer in ("in_layers.2", "conv")
    )


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"the checkpoint has no {name!r}; accepted: state dicts of OpenAI's U-Net")
    return tuple(weights[name].shape)
