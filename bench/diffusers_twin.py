"""diffusers' U-Net with the architecture and the weights of ours: the fairest peer there is."""

from __future__ import annotations

from typing import Any

from torch import nn

from stepfuse.engine.networks.unet import UNet
from stepfuse.engine.networks.unet_blocks import Downsample, ResidualBlock, Stage, Upsample


def diffusers_twin(model: UNet, sample_size: int | None = None) -> nn.Module:
    """diffusers' network with the configuration and the weights of ours.

    ``sample_size`` is what its pipelines draw; the network itself takes any.
    """
    from diffusers import UNet2DModel

    c = model.config
    attends = [2**level in c.attention_factors for level in range(len(c.channel_multipliers))]
    resampling = {"conv": "conv", "resblock": "resnet"}[c.updown]
    twin = UNet2DModel(
        sample_size=sample_size,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        block_out_channels=c.level_channels,
        layers_per_block=c.blocks_per_level,
        down_block_types=["AttnDownBlock2D" if a else DOWN[resampling] for a in attends],
        up_block_types=["AttnUpBlock2D" if a else UP[resampling] for a in reversed(attends)],
        downsample_type=resampling,
        upsample_type=resampling,
        downsample_padding=0 if c.asymmetric_downsample else 1,
        resnet_time_scale_shift="scale_shift" if c.scale_shift else "default",
        flip_sin_to_cos=c.embedding_order == "cos_sin",
        freq_shift=0 if c.embedding_order == "cos_sin" else 1,
        norm_num_groups=c.norm_groups,
        attn_norm_num_groups=c.norm_groups,
        norm_eps=c.norm_eps,
        attention_head_dim=c.head_channels,
        num_class_embeds=None if c.num_classes is None else c.num_classes + 1,
    ).eval()
    copy_weights(model, twin)
    return twin.requires_grad_(False)


DOWN = {"conv": "DownBlock2D", "resnet": "ResnetDownsampleBlock2D"}
UP = {"conv": "UpBlock2D", "resnet": "ResnetUpsampleBlock2D"}


def copy_weights(ours: UNet, theirs: Any) -> None:
    same(ours.conv_in, theirs.conv_in)
    same(ours.time_embedding[0], theirs.time_embedding.linear_1)
    same(ours.time_embedding[2], theirs.time_embedding.linear_2)
    if ours.class_embedding is not None:
        same(ours.class_embedding, theirs.class_embedding)
    down, middle, up = iter(ours.down), iter(ours.middle), iter(ours.up)
    for block in theirs.down_blocks:
        copy_level(down, block, block.downsamplers)
    copy_stage(next(middle), theirs.mid_block.resnets[0], theirs.mid_block.attentions[0])
    copy_block(next(middle), theirs.mid_block.resnets[1])
    for block in theirs.up_blocks:
        copy_level(up, block, block.upsamplers)
    for layers in (down, middle, up):
        assert next(layers, None) is None, "a layer has no counterpart"
    same(ours.norm_out, theirs.conv_norm_out)
    same(ours.conv_out, theirs.conv_out)


def copy_level(ours: Any, theirs: Any, resamplers: Any) -> None:
    attentions = getattr(theirs, "attentions", [None] * len(theirs.resnets))
    for resnet, attention in zip(theirs.resnets, attentions, strict=True):
        copy_stage(next(ours), resnet, attention)
    for resampler in resamplers or []:
        layer = next(ours)
        if isinstance(layer, Downsample | Upsample):
            same(layer.conv, resampler.conv)
        else:
            copy_block(layer, resampler)


def copy_stage(ours: Stage, resnet: Any, attention: Any) -> None:
    copy_block(ours.block, resnet)
    assert (ours.attention is None) == (attention is None)
    if ours.attention is not None:
        same(ours.attention.norm, attention.group_norm)
        same(ours.attention.out, attention.to_out[0])
        parts = zip(
            ours.attention.qkv.weight.chunk(3), ours.attention.qkv.bias.chunk(3), strict=True
        )
        for (weight, bias), linear in zip(
            parts, (attention.to_q, attention.to_k, attention.to_v), strict=True
        ):
            linear.weight.data.copy_(weight)
            linear.bias.data.copy_(bias)


def copy_block(ours: ResidualBlock, resnet: Any) -> None:
    same(ours.norm1, resnet.norm1)
    same(ours.conv1, resnet.conv1)
    same(ours.projection, resnet.time_emb_proj)
    same(ours.norm2, resnet.norm2)
    same(ours.conv2, resnet.conv2)
    if resnet.conv_shortcut is not None:
        same(ours.shortcut, resnet.conv_shortcut)


def same(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.load_state_dict(ours.state_dict())
