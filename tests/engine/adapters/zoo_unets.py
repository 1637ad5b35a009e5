"""Pipelines of diffusers around U-Nets of two and three dimensions, small and random."""

from __future__ import annotations

from typing import Any

from tests.engine.adapters.diffusers_models import vqmodel
from tests.engine.adapters.zoo_parts import (
    BLOCKS,
    CROSSING,
    NO_TEXT_PARTS,
    NO_TEXTS,
    NOTHING,
    WIDTH,
    controlnet_model,
    ddim,
    unet_2d,
    vae,
)
from torch import nn

from stepfuse.bench.stable_diffusion import text_encoder


def stable_diffusion_xl(kind: str = "") -> Any:
    """Text, size and crop come as ``added_cond_kwargs``."""
    import diffusers

    unet = unet_2d(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
        transformer_layers_per_block=(2, 1),
    )
    pipeline = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")
    return pipeline(vae=vae(), unet=unet, scheduler=ddim(), **NO_TEXTS, add_watermarker=False)


def controlnet() -> Any:
    """Its residuals are inputs of the U-Net."""
    from diffusers import StableDiffusionControlNetPipeline

    return StableDiffusionControlNetPipeline(
        vae=vae(),
        unet=unet_2d(),
        controlnet=controlnet_model(),
        scheduler=ddim(),
        **NO_TEXT_PARTS,
        **NOTHING,
        requires_safety_checker=False,
    )


def two_controlnets() -> Any:
    """Both in one module, a list of images for them."""
    from diffusers import StableDiffusionControlNetPipeline

    return StableDiffusionControlNetPipeline(
        vae=vae(),
        unet=unet_2d(),
        controlnet=[controlnet_model(), controlnet_model()],
        scheduler=ddim(),
        **NO_TEXT_PARTS,
        **NOTHING,
        requires_safety_checker=False,
    )


def kandinsky() -> Any:
    """The image embedding in the place of text, a learned variance."""
    from diffusers import DDPMScheduler, KandinskyV22Pipeline

    unet = unet_2d(
        out_channels=6,
        in_channels=3,
        addition_embed_type="image",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=True)
    return KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=vqmodel())


def upscale() -> Any:
    """The small image beside the latents, its noise level as a class."""
    from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline

    return StableDiffusionUpscalePipeline(
        vae=vae(),
        unet=unet_2d(in_channels=7, num_class_embeds=400),
        low_res_scheduler=DDPMScheduler(),
        scheduler=ddim(prediction_type="v_prediction"),
        **NO_TEXT_PARTS,
    )


def instruct_pix2pix() -> Any:
    """The image's latents beside the latents, three evaluations in one."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return StableDiffusionInstructPix2PixPipeline(
        vae=vae(),
        unet=unet_2d(in_channels=8),
        scheduler=ddim(),
        **NO_TEXT_PARTS,
        **NOTHING,
        requires_safety_checker=False,
    )


def animate_diff() -> Any:
    """A U-Net of images with motion modules between its layers."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    unet = unet_2d()
    return AnimateDiffPipeline(
        vae=vae(), unet=unet, motion_adapter=adapter, scheduler=ddim(), **NO_TEXT_PARTS
    )


def text_to_video() -> Any:
    """A U-Net of three dimensions."""
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

    unet = UNet3DConditionModel(
        **CROSSING,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    for name, layer in unet.named_modules():
        if name.endswith("conv4.3"):
            nn.init.normal_(layer.weight, std=0.1)  # the last of a temporal block starts from zero
    return TextToVideoSDPipeline(vae=vae(), unet=unet, scheduler=ddim(), **NO_TEXT_PARTS)


def audioldm2() -> Any:
    """Two kinds of text, sound for a result."""
    from diffusers import AudioLDM2Pipeline, AudioLDM2UNet2DConditionModel
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    unet = AudioLDM2UNet2DConditionModel(
        **{**CROSSING, "cross_attention_dim": ((None, WIDTH, WIDTH),) * 2},
        **BLOCKS,
        sample_size=8,
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            normalize_before=False,
        )
    )
    return AudioLDM2Pipeline(
        vae=vae(in_channels=1, out_channels=1),
        projection_model=None,
        # asked for their dtype, where the embeddings are given
        text_encoder_2=text_encoder(WIDTH),
        language_model=text_encoder(WIDTH),
        text_encoder=None,
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=unet,
        scheduler=ddim(),
        vocoder=vocoder,
    )
