"""diffusers' pipelines with small random weights, and how their images are compared."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from stepfuse.bench.stable_diffusion import parts, text_encoder, tokenizer

# dB in float32, stated for every pipeline: sums in another order through a few steps are far above
SAME = 50.0


def unet2d(channels: int = 3, out_channels: int = 3, **options: Any) -> Any:
    """A UNet2DModel of two levels with attention, images of 8x8."""
    from diffusers import UNet2DModel

    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DModel(
        in_channels=channels, out_channels=out_channels, **{**defaults, **options}
    ).eval()


def least_unet2d(**options: Any) -> Any:
    """A UNet2DModel of one level, which compiles in a fraction of a second."""
    blocks: dict[str, Any] = {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    }
    return unet2d(**blocks, **options)


def vqmodel() -> Any:
    """A VQModel of 3 latent channels, a factor of 2."""
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
    ).eval()


def build(name: str, folder: Path, **options: Any) -> Any:
    """The pipeline of this name; ``options`` are those of `parts`, for Stable Diffusion."""
    import diffusers
    from diffusers import DDIMScheduler, DDPMScheduler

    torch.manual_seed(0)
    kind = getattr(diffusers, name)
    if name == "DDPMPipeline":
        pipe = kind(unet2d(), DDPMScheduler())
    elif name == "DDIMPipeline":
        pipe = kind(unet2d(), DDIMScheduler())
    elif name == "LDMPipeline":
        pipe = kind(vqmodel(), unet2d(), DDIMScheduler())
    elif name == "LDMSuperResolutionPipeline":
        pipe = kind(vqmodel(), unet2d(6), DDIMScheduler())
    elif name == "LDMTextToImagePipeline":
        stable = parts(folder)
        scheduler = DDIMScheduler(clip_sample=False)
        pipe = kind(stable["vae"], text_encoder(8), tokenizer(folder), stable["unet"], scheduler)
    else:
        pipe = kind(**parts(folder, **options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> Any:
    """One generator, or a list of them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


def picture(seed: int = 3, size: int = 16) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def mask(size: int = 16) -> PIL.Image.Image:
    """The right half is to be painted."""
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[:, size // 2 :] = 255
    return PIL.Image.fromarray(pixels)


def call(pipe: Any, **options: Any) -> Any:
    """Images of this pipeline, as an array in [0, 1] unless ``output_type`` says otherwise."""
    name = type(pipe).__name__
    settings: dict[str, Any] = {
        "num_inference_steps": 4,
        "generator": seeded(1),
        "output_type": "np",
    }
    if "StableDiffusion" in name:
        settings |= {"prompt": "a cat", "guidance_scale": 4.0}
    if name == "LDMTextToImagePipeline":
        settings |= {"prompt": "a cat", "guidance_scale": 4.0, "height": 64, "width": 64}
    if name == "LDMSuperResolutionPipeline":
        settings |= {"image": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}
    if name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"):
        settings |= {"image": picture(), "strength": 0.8}
    if name == "StableDiffusionInpaintPipeline":
        settings |= {"mask_image": mask(), "height": 16, "width": 16}
    torch.manual_seed(5)  # the two LDM pipelines do not hand the generator to their scheduler
    return pipe(**{**settings, **options}).images


def psnr(images: Any, reference: Any, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB; infinite where they are equal."""
    images, reference = (torch.as_tensor(x).double() for x in (images, reference))
    assert images.shape == reference.shape
    assert bool(images.isfinite().all())
    error = float((images - reference).square().mean())
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def spread(images: Any) -> float:
    """Standard deviation: images of one colour would make any comparison empty."""
    return float(torch.as_tensor(images).double().std())


def counted(unet: Any, function: Callable[[], Any]) -> int:
    """How often the U-Net's own forward runs during ``function``; compiled networks do not."""
    code, count = inspect.unwrap(type(unet).forward).__code__, 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code is code

    # not by another forward: a changed class would be noticed, and compiled for
    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
