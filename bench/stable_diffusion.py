"""The parts of a StableDiffusionPipeline with random weights, in any size, without a hub."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LENGTH = 77  # tokens of a prompt
_START, _END = "<|startoftext|>", "<|endoftext|>"


def parts(
    folder: Path,
    *,
    channels: Sequence[int] = (8, 16),
    sample_size: int = 8,
    in_channels: int = 4,
    width: int = 8,
    heads: int = 2,
    groups: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of a StableDiffusionPipeline; ``folder`` takes the tokenizer's files.

    Args:
        channels: of the U-Net's levels, cross-attention on all but the last.
        sample_size: of the latents; images are twice as large.
        in_channels: of the U-Net: 4, or 9 for inpainting.
        width: of the text encoder.
    """
    from diffusers import AutoencoderKL, DDIMScheduler

    torch.manual_seed(seed)
    unet = conditional_unet(channels, sample_size, in_channels, width, heads, groups)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * sample_size,
    )
    return {
        "unet": unet,
        "vae": vae.eval(),
        "text_encoder": text_encoder(width),
        "tokenizer": tokenizer(folder),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def conditional_unet(
    channels: Sequence[int] = (8, 16),
    sample_size: int = 8,
    in_channels: int = 4,
    width: int = 8,
    heads: int = 2,
    groups: int = 4,
) -> Any:
    """A UNet2DConditionModel, cross-attention to [N, tokens, width] on all levels but the last."""
    from diffusers import UNet2DConditionModel

    crossing = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=(*["CrossAttnDownBlock2D"] * crossing, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * crossing),
        cross_attention_dim=width,
        attention_head_dim=heads,
        norm_num_groups=groups,
    ).eval()


def text_encoder(width: int) -> Any:
    """A CLIPTextModel of one layer, [N, 77] tokens to [N, 77, width]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokens[_START],
        eos_token_id=tokens[_END],
        pad_token_id=tokens[_END],
    )
    return CLIPTextModel(config).eval()


def tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer that knows the small letters; its files are written to ``folder``."""
    from transformers import CLIPTokenizer

    (folder / "vocab.json").write_text(json.dumps(_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH
    )


def _vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "th", _START, _END]
    return {token: number for number, token in enumerate(tokens)}
