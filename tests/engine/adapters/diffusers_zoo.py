"""Pipelines of diffusers of many kinds, in small random configurations, and a call of each.

No tokenizer is needed: prompts are given as embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.engine.adapters import zoo_transformers, zoo_unets
from tests.engine.adapters.diffusers_models import mask, noise, picture, seeded
from tests.engine.adapters.zoo_parts import WIDTH
from torch import nn

TOKENS = 5  # of the embedded prompts
TEXT, NO_TEXT = noise(1, TOKENS, WIDTH, seed=1), noise(1, TOKENS, WIDTH, seed=2)
PROMPT = {"prompt_embeds": TEXT, "negative_prompt_embeds": NO_TEXT}
POOLED = {
    "pooled_prompt_embeds": noise(1, WIDTH, seed=3),
    "negative_pooled_prompt_embeds": noise(1, WIDTH, seed=4),
}

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
    "StableDiffusionXL": (zoo_unets.stable_diffusion_xl, {**_XL, **_SMALL}),
    "StableDiffusionXLImg2Img": (
        lambda: zoo_unets.stable_diffusion_xl("Img2Img"),
        {**_XL, "image": picture(), "strength": 0.8},
    ),
    "StableDiffusionXLInpaint": (
        lambda: zoo_unets.stable_diffusion_xl("Inpaint"),
        {**_XL, **_SMALL, "image": picture(), "mask_image": mask(), "strength": 0.8},
    ),
    "ControlNet": (zoo_unets.controlnet, {**_STABLE, "image": picture()}),
    "MultiControlNet": (
        zoo_unets.two_controlnets,
        {
            **_STABLE,
            "image": [picture(), picture(4)],
            "controlnet_conditioning_scale": [1.0, 0.5],
        },
    ),
    "Kandinsky22": (
        zoo_unets.kandinsky,
        {
            **_SMALL,
            "image_embeds": noise(1, WIDTH, seed=5),
            "negative_image_embeds": noise(1, WIDTH, seed=6),
            "output_type": "np",
        },
    ),
    "Upscale": (zoo_unets.upscale, {**_STABLE, "image": noise(1, 3, 8, 8, seed=7).clamp(-1, 1)}),
    "InstructPix2Pix": (zoo_unets.instruct_pix2pix, {**_STABLE, "image": picture()}),
    "AnimateDiff": (zoo_unets.animate_diff, {**_STABLE, **_SMALL, "num_frames": 3}),
    "TextToVideo": (zoo_unets.text_to_video, {**_STABLE, **_SMALL, "num_frames": 3}),
    "DiT": (zoo_transformers.dit, {"class_labels": [3, 7], "output_type": "np"}),
    "PixArtAlpha": (
        zoo_transformers.pixart,
        {**_STABLE, **_SMALL, **_MASKS, "use_resolution_binning": False},
    ),
    "PixArtSigma": (
        lambda: zoo_transformers.pixart("Sigma"),
        {**_STABLE, **_SMALL, **_MASKS, "use_resolution_binning": False},
    ),
    "StableDiffusion3": (zoo_transformers.stable_diffusion_3, {**_XL, **_SMALL}),
    "Flux": (
        zoo_transformers.flux,
        {
            **_SMALL,
            "prompt_embeds": TEXT,
            "pooled_prompt_embeds": POOLED["pooled_prompt_embeds"],
            "output_type": "np",
        },
    ),
    "AudioLDM2": (
        zoo_unets.audioldm2,
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
