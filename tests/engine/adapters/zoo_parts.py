"""Small random parts of pipelines of diffusers."""

from __future__ import annotations

from typing import Any

from torch import nn

WIDTH = 8  # of the embedded prompts
NOTHING = {"safety_checker": None, "feature_extractor": None}
NO_TEXT_PARTS = {"text_encoder": None, "tokenizer": None}
NO_TEXTS = {**NO_TEXT_PARTS, "text_encoder_2": None, "tokenizer_2": None}
LEVELS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
CROSSING = {**LEVELS, "cross_attention_dim": WIDTH, "attention_head_dim": 4}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**settings, **options})


def unet_2d(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{"sample_size": 8, **CROSSING, **BLOCKS, **options})


def controlnet_model() -> Any:
    from diffusers import ControlNetModel

    made = ControlNetModel(
        **CROSSING,
        down_block_types=BLOCKS["down_block_types"],
        conditioning_embedding_out_channels=(4, 8),
    )
    for layer in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=0.3)  # they start from zero, and so would say nothing
    nn.init.normal_(made.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return made


def ddim(**options: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{"clip_sample": False, **options})
