"""Pipelines of diffusers around transformers, small and random."""

from __future__ import annotations

from typing import Any

from tests.engine.adapters.zoo_parts import NO_TEXT_PARTS, NO_TEXTS, WIDTH, ddim, vae


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
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim())


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
    return pipeline(vae=vae(), transformer=transformer, scheduler=ddim(), **NO_TEXT_PARTS)


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
        vae=vae(shift_factor=0.05),
        text_encoder_3=None,
        tokenizer_3=None,
        **NO_TEXTS,
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
        vae=vae(shift_factor=0.05),
        transformer=transformer,
        **NO_TEXTS,
    )
