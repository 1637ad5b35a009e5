"""Pipelines of diffusers of many kinds, in small random configurations, and a call of each.

No tokenizer is needed: prompts are given as embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.engine.adapters.diffusers_models import mask, noise, picture, seeded, vqmodel
from torch import nn

from stepfuse.bench.stable_diffusion import text_encoder

WIDTH, TOKENS = 8, 5  # of the embedded prompts
TEXT, NO_TEXT = noise(1, TOKENS, WIDTH, seed=1), noise(1, TOKENS, WIDTH, seed=2)
PROMPT = {"prompt_embeds": TEXT, "negative_prompt_embeds": NO_TEXT}
POOLED = {
    "pooled_prompt_embeds": noise(1, WIDTH, seed=3),
    "negative_pooled_prompt_embeds": noise(1, WIDTH, seed=4),
}
NOTHING = {"safety_checker": None, "feature_extractor": None}
_NO_TEXT = {"text_encoder": None, "tokenizer": None}
_NO_TEXTS = {**_NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
_LEVELS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
_CROSSING = {**_LEVELS, "cross_attention_dim": WIDTH, "attention_head_dim": 4}
_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def _vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**settings, **options})


def _unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{"sample_size": 8, **_CROSSING, **_BLOCKS, **options})


def _controlnet() -> Any:
    from diffusers import ControlNetModel

    made = ControlNetModel(
        **_CROSSING,
        down_block_types=_BLOCKS["down_block_types"],
        conditioning_embedding_out_channels=(4, 8),
    )
    for layer in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=0.3)  # they start from zero, and so would say nothing
    nn.init.normal_(made.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return made


def _ddim(**options: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{"clip_sample": False, **options})


def stable_diffusion_xl(kind: str = "") -> Any:
    """Text, size and crop come as ``added_cond_kwargs``."""
    import diffusers

    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
        transformer_layers_per_block=(2, 1),
    )
    pipeline = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")
    return pipeline(vae=_vae(), unet=unet, scheduler=_ddim(), **_NO_TEXTS, add_watermarker=False)


def controlnet() -> Any:
    """Its residuals are inputs of the U-Net."""
    from diffusers import StableDiffusionControlNetPipeline

    return StableDiffusionControlNetPipeline(
        vae=_vae(),
        unet=_unet(),
        controlnet=_controlnet(),
        scheduler=_ddim(),
        **_NO_TEXT,
        **NOTHING,
        requires_safety_checker=False,
    )


def two_controlnets() -> Any:
    """Both in one module, a list of images for them."""
    from diffusers import StableDiffusionControlNetPipeline

    return StableDiffusionControlNetPipeline(
        vae=_vae(),
        unet=_unet(),
        controlnet=[_controlnet(), _controlnet()],
        scheduler=_ddim(),
        **_NO_TEXT,
        **NOTHING,
        requires_safety_checker=False,
    )


def kandinsky() -> Any:
    """The image embedding in the place of text, a learned variance."""
    from diffusers import DDPMScheduler, KandinskyV22Pipeline

    unet = _unet(
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
        vae=_vae(),
        unet=_unet(in_channels=7, num_class_embeds=400),
        low_res_scheduler=DDPMScheduler(),
        scheduler=_ddim(prediction_type="v_prediction"),
        **_NO_TEXT,
    )


def instruct_pix2pix() -> Any:
    """The image's latents beside the latents, three evaluations in one."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return StableDiffusionInstructPix2PixPipeline(
        vae=_vae(),
        unet=_unet(in_channels=8),
        scheduler=_ddim(),
        **_NO_TEXT,
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
    unet = _unet()
    return AnimateDiffPipeline(
        vae=_vae(), unet=unet, motion_adapter=adapter, scheduler=_ddim(), **_NO_TEXT
    )


def text_to_video() -> Any:
    """A U-Net of three dimensions."""
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

    unet = UNet3DConditionModel(
        **_CROSSING,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    for name, layer in unet.named_modules():
        if name.endswith("conv4.3"):
            nn.init.normal_(layer.weight, std=0.1)  # the last of a temporal block starts from zero
    return TextToVideoSDPipeline(vae=_vae(), unet=unet, scheduler=_ddim(), **_NO_TEXT)


def dit() -> Any:
    """Classes, epsilon and variance."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer, vae=_vae(), scheduler=_ddim())


def pixart(kind: str = "Alpha") -> Any:
    """Text with a mask, resolutions in a dict."""
    import diffusers
    from diffusers import PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        use_additional_conditions=False,
    )
    pipeline = getattr(diffusers, f"PixArt{kind}Pipeline")
    return pipeline(vae=_vae(), transformer=transformer, scheduler=_ddim(), **_NO_TEXT)


def stable_diffusion_3() -> Any:
    """Two streams, flow matching, timesteps that are floats."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift_factor=0.05),
        text_encoder_3=None,
        tokenizer_3=None,
        **_NO_TEXTS,
    )


def flux() -> Any:
    """Packed latents, rotary positions, guidance as an input."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.05),
        transformer=transformer,
        **_NO_TEXTS,
    )


def audioldm2() -> Any:
    """Two kinds of text, sound for a result."""
    from diffusers import AudioLDM2Pipeline, AudioLDM2UNet2DConditionModel
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    unet = AudioLDM2UNet2DConditionModel(
        **{**_CROSSING, "cross_attention_dim": ((None, WIDTH, WIDTH),) * 2},
        **_BLOCKS,
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
        vae=_vae(in_channels=1, out_channels=1),
        projection_model=None,
        # asked for their dtype, where the embeddings are given
        text_encoder_2=text_encoder(WIDTH),
        language_model=text_encoder(WIDTH),
        text_encoder=None,
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=unet,
        scheduler=_ddim(),
        vocoder=vocoder,
    )


Case = tuple[Callable[[], Any], dict[str, Any]]
_STABLE = {**PROMPT, "guidance_scale": 4.0, "output_type": "np"}
_XL = {**_STABLE, **POOLED}
_SMALL = {"height": 16, "width": 16}
_MASKS = {
    "prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    "negative_prompt": None,
    "negative_prompt_attention_mask": torch.tensor([[1, 1, 0, 0, 0]]),
}

# by name: how it is built, and the arguments of a call
ZOO: dict[str, Case] = {
    "StableDiffusionXL": (stable_diffusion_xl, {**_XL, **_SMALL}),
    "StableDiffusionXLImg2Img": (
        lambda: stable_diffusion_xl("Img2Img"),
        {**_XL, "image": picture(), "strength": 0.8},
    ),
    "StableDiffusionXLInpaint": (
        lambda: stable_diffusion_xl("Inpaint"),
        {**_XL, **_SMALL, "image": picture(), "mask_image": mask(), "strength": 0.8},
    ),
    "ControlNet": (controlnet, {**_STABLE, "image": picture()}),
    "MultiControlNet": (
        two_controlnets,
        {
            **_STABLE,
            "image": [picture(), picture(4)],
            "controlnet_conditioning_scale": [1.0, 0.5],
        },
    ),
    "Kandinsky22": (
        kandinsky,
        {
            **_SMALL,
            "image_embeds": noise(1, WIDTH, seed=5),
            "negative_image_embeds": noise(1, WIDTH, seed=6),
            "output_type": "np",
        },
    ),
    "Upscale": (upscale, {**_STABLE, "image": noise(1, 3, 8, 8, seed=7).clamp(-1, 1)}),
    "InstructPix2Pix": (instruct_pix2pix, {**_STABLE, "image": picture()}),
    "AnimateDiff": (animate_diff, {**_STABLE, **_SMALL, "num_frames": 3}),
    "TextToVideo": (text_to_video, {**_STABLE, **_SMALL, "num_frames": 3}),
    "DiT": (dit, {"class_labels": [3, 7], "output_type": "np"}),
    "PixArtAlpha": (
        pixart,
        {**_STABLE, **_SMALL, **_MASKS, "use_resolution_binning": False},
    ),
    "PixArtSigma": (
        lambda: pixart("Sigma"),
        {**_STABLE, **_SMALL, **_MASKS, "use_resolution_binning": False},
    ),
    "StableDiffusion3": (stable_diffusion_3, {**_XL, **_SMALL}),
    "Flux": (
        flux,
        {
            **_SMALL,
            "prompt_embeds": TEXT,
            "pooled_prompt_embeds": POOLED["pooled_prompt_embeds"],
            "output_type": "np",
        },
    ),
    "AudioLDM2": (
        audioldm2,
        {
            **PROMPT,
            "generated_prompt_embeds": noise(1, 3, WIDTH, seed=8),
            "negative_generated_prompt_embeds": noise(1, 3, WIDTH, seed=9),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
            "negative_attention_mask": torch.tensor([[1, 1, 0, 0, 0]]),
            "audio_length_in_s": 0.004,
            "guidance_scale": 3.0,
        },
    ),
}


def build(name: str) -> Any:
    """The pipeline of this name, in evaluation mode, always with the same weights."""
    torch.manual_seed(0)
    pipe = ZOO[name][0]()
    for part in vars(pipe).values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, name: str, **options: Any) -> torch.Tensor:
    """What the pipeline makes from seed 1, as one tensor."""
    settings = {"num_inference_steps": 3, "generator": seeded(1), **ZOO[name][1], **options}
    torch.manual_seed(5)
    return torch.as_tensor(pipe(**settings, return_dict=False)[0])
