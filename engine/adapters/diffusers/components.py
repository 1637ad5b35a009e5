"""What of a pipeline runs compiled: its denoisers, and what else is asked for by name.

    unet, transformer, controlnet, prior, ...    every component that takes a timestep
    also=("vae", "text_encoder")                 vae.encoder and vae.decoder, the encoder itself

Encoder and decoder of a VAE are called by its own methods, which go on to slice and tile.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import stepfuse.engine.adapters.diffusers.denoiser as denoiser
from stepfuse.kernels.arguments import check_words
from stepfuse.kernels.checks import shown

USUAL = ("unet", "transformer")  # where a pipeline has its denoiser
_CODERS = ("encoder", "decoder")


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The components that are called with a timestep, by name; what stands in the usual place."""
    return {
        name: part
        for name, part in vars(pipe).items()
        if denoiser.is_denoiser(part) or (name in USUAL and isinstance(part, nn.Module))
    }


def check_also(obj: Any, also: Any) -> tuple[str, ...]:
    """The names of other components; TypeError or ValueError unless ``obj`` is a pipeline that has
    them.
    """
    found = {name for name, part in vars(obj).items() if isinstance(part, nn.Module)}
    others = sorted(found - denoisers(obj).keys())
    if others or not isinstance(also, (tuple, list, set, frozenset)):
        return check_words("also", also, others)
    if also:
        raise ValueError(f"also must be empty for what has no other components; got {shown(also)}")
    return ()


def chosen(pipe: Any, also: tuple[str, ...]) -> dict[str, nn.Module]:
    """What is to be compiled, by the path from the pipeline."""
    found = denoisers(pipe)
    for name in also:
        component = vars(pipe).get(name)
        parts = [getattr(component, part, None) for part in _CODERS]
        coders = [part for part in parts if isinstance(part, nn.Module)]
        if denoiser.is_model(component) and len(coders) == len(_CODERS):
            found |= {f"{name}.{c}": part for c, part in zip(_CODERS, coders, strict=True)}
        elif isinstance(component, nn.Module):
            found[name] = component
    return found
