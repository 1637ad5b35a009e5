"""Pipelines and diffusions of other libraries, as their users run them: what is accelerated.

A case builds an object and runs it to images in [0, 1]. The networks are our digits checkpoint in
diffusers' classes, and others with random weights in the sizes that people use.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stepfuse as sf
from stepfuse.bench.diffusers_twin import diffusers_twin
from stepfuse.bench.networks import cifar10
from stepfuse.bench.stable_diffusion import parts

CHECKOUT = "GUIDED_DIFFUSION"  # the environment variable that names a checkout of it


@dataclass(frozen=True)
class Case:
    """One object of a library and the call that is timed.

    Args:
        library: whose object it is.
        label: the class, the network and the settings.
        build: makes the object. ImportError or RuntimeError where it cannot, with the reason.
        run: the same images every time, [N, ...] in [0, 1], from the object or one like it.
    """

    library: str
    label: str
    build: Callable[[], Any]
    run: Callable[[Any], Tensor]

    def __str__(self) -> str:
        return f"{self.library} {self.label}"


def cases() -> list[Case]:
    """All of them; nothing is built yet."""
    found = []
    for batch in (1, 8):
        for name, steps in (("DDIMPipeline", 50), ("DDPMPipeline", 50)):
            found.append(
                Case(
                    "diffusers",
                    f"{name} digits, batch {batch}, {steps} steps",
                    lambda name=name: _pipeline(name, digits()),
                    lambda pipe, batch=batch, steps=steps: _images(pipe, batch, steps),
                )
            )
    for batch in (1, 8):
        found.append(
            Case(
                "diffusers",
                f"DDIMPipeline 35.7M for CIFAR-10, batch {batch}, 5 steps",
                lambda: _pipeline("DDIMPipeline", cifar10()),
                lambda pipe, batch=batch: _images(pipe, batch, 5),
            )
        )
    found.append(
        Case(
            "diffusers",
            "StableDiffusionPipeline small, latents 32x32, guided, 10 steps",
            stable_diffusion,
            lambda pipe: _images(pipe, 1, 10, prompt="a cat", guidance_scale=7.5),
        )
    )
    for label, fewer in (("DDIM, 20 of 1000 steps", 20), ("DDPM, 50 steps", None)):
        found.append(
            Case(
                "denoising-diffusion-pytorch",
                f"GaussianDiffusion dim 32, 32x32, batch 4, {label}",
                lambda fewer=fewer: lucidrains(fewer),
                lambda diffusion: _seeded(lambda: diffusion.sample(batch_size=4)),
            )
        )
    for loop in ("ddim_sample_loop", "p_sample_loop"):
        found.append(
            Case(
                "guided-diffusion",
                f"{loop} digits, batch 4, 25 steps",
                guided_diffusion,
                lambda diffusion, loop=loop: _guided(diffusion, loop, 4),
            )
        )
    return found


def digits() -> Any:
    """The embedded checkpoint in diffusers' class, for the null class alone.

    The pipelines pass no labels, so that the null class's embedding goes into the bias of the layer
    that it is added to.
    """
    from diffusers import UNet2DModel

    checkpoint = sf.load("digits")
    twin: Any = diffusers_twin(checkpoint.model, checkpoint.sample_shape[-1])
    unet = UNet2DModel.from_config({**twin.config, "num_class_embeds": None}).eval()
    weights = twin.state_dict()
    null = weights.pop("class_embedding.weight")[checkpoint.num_classes]
    weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + null
    unet.load_state_dict(weights)
    return unet.requires_grad_(False)


def stable_diffusion() -> Any:
    """A StableDiffusionPipeline with a U-Net of three levels and random weights."""
    from diffusers import StableDiffusionPipeline

    with tempfile.TemporaryDirectory() as folder:
        pipe = StableDiffusionPipeline(
            **parts(
                Path(folder), channels=(32, 64, 128), sample_size=32, width=64, heads=8, groups=32
            )
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lucidrains(steps: int | None) -> Any:
    """A GaussianDiffusion with its Unet; DDIM where ``steps`` are given."""
    package = importlib.import_module("denoising_diffusion_pytorch")
    torch.manual_seed(0)
    network = package.Unet(dim=32, dim_mults=(1, 2, 4), flash_attn=False)
    diffusion = package.GaussianDiffusion(
        network, image_size=32, timesteps=1000 if steps else 50, sampling_timesteps=steps
    )
    return diffusion.eval().requires_grad_(False)


def guided_diffusion() -> Any:
    """A SpacedDiffusion of guided-diffusion, which is not on PyPI, over 25 of 1000 steps."""
    checkout = os.environ.get(CHECKOUT)
    if checkout and checkout not in sys.path:
        sys.path.append(checkout)
    try:
        theirs = importlib.import_module("guided_diffusion.gaussian_diffusion")
        respace = importlib.import_module("guided_diffusion.respace")
    except ImportError as error:
        raise ImportError(f"{error}; {CHECKOUT}=FOLDER names a checkout of it") from None
    return respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(1000, "ddim25"),
        betas=theirs.get_named_beta_schedule("linear", 1000),
        model_mean_type=theirs.ModelMeanType.EPSILON,
        model_var_type=theirs.ModelVarType.FIXED_SMALL,
        loss_type=theirs.LossType.MSE,
    )


def _pipeline(name: str, unet: Any) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name.replace("Pipeline", "Scheduler"))()
    pipe = getattr(diffusers, name)(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _images(pipe: Any, batch: int, steps: int, **options: Any) -> Tensor:
    if "prompt" not in options:
        options["batch_size"] = batch
    return torch.as_tensor(
        pipe(
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=steps,
            output_type="pt",
            return_dict=False,
            **options,
        )[0]
    )


def _seeded(run: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return run()


def _guided(diffusion: Any, loop: str, batch: int) -> Tensor:
    network = _digits_network()
    shape = (batch, *sf.load("digits").sample_shape)
    samples: Tensor = _seeded(
        lambda: getattr(diffusion, loop)(network, shape, clip_denoised=True, device="cpu")
    )
    return samples.clamp(-1, 1) / 2 + 0.5


_networks: list[Any] = []


def _digits_network() -> Any:
    """One for all calls: an adapter keeps what it compiled by the network's identity."""
    if not _networks:
        _networks.append(sf.load("digits").model)
    return _networks[0]
