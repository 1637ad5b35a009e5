"""diffusers: schedulers that take the place of its own, and its pipelines and U-Nets made fast.

    from stepfuse.engine.adapters.diffusers import DDIMScheduler, accelerate, explain, restore

    pipe = accelerate(pipe)          # the same object: same calls, same images
    print(explain(pipe))
    pipe = restore(pipe)             # as it was

The schedulers need diffusers and are imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from stepfuse.engine.adapters.diffusers import components, denoiser, pipelines
from stepfuse.engine.adapters.patch import class_name

if TYPE_CHECKING:
    from stepfuse.engine.adapters.diffusers.consistency import LCMScheduler, TCDScheduler
    from stepfuse.engine.adapters.diffusers.ddim import DDIMScheduler
    from stepfuse.engine.adapters.diffusers.ddim_inverse import DDIMInverseScheduler
    from stepfuse.engine.adapters.diffusers.ddpm import DDPMScheduler
    from stepfuse.engine.adapters.diffusers.dpm_multistep import DPMSolverMultistepScheduler
    from stepfuse.engine.adapters.diffusers.euler import (
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
    from stepfuse.engine.adapters.diffusers.heun import HeunDiscreteScheduler
    from stepfuse.engine.adapters.diffusers.pndm import PNDMScheduler
    from stepfuse.engine.adapters.diffusers.unipc_multistep import UniPCMultistepScheduler

__all__ = [
    "SUPPORTED",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "accelerate",
    "explain",
    "restore",
    "supports",
]

SUPPORTED: tuple[str, ...] = (denoiser.SUPPORTED, pipelines.SUPPORTED)
Object = TypeVar("Object")


def supports(obj: Any) -> bool:
    """Whether ``obj`` is one of `SUPPORTED`."""
    return pipelines.is_pipeline(obj) or denoiser.is_denoiser(obj)


def accelerate(
    obj: Object,
    *,
    optimize: bool = True,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    also: Collection[str] = (),
) -> Object:
    """Make a pipeline or a model of diffusers fast, in place, and return it.

    A pipeline's scheduler, where it is one that we have (DDIM, DDPM, Euler, DPM-Solver++, UniPC,
    LCM, ...), is exchanged for ours of the same name, configuration and timesteps; its loop stays
    its own. The forward of every denoiser (U-Net, transformer, ControlNet) runs networks that are
    compiled when a shape is first met. Nothing else changes: neither module nor weights, nor what
    ``save_pretrained`` writes. Called again, the last options hold.

    Args:
        obj: one of `SUPPORTED`.
        optimize: compile the denoisers.
        dtype: torch.bfloat16 (or float16) for the products inside them; inputs and outputs keep
            their dtype. None computes in the dtype of the weights.
        strict: reproduce diffusers where it errs. False does what is right, see the schedulers.
        also: names of components of a pipeline to be compiled beside its denoisers: "vae" (its
            encoder and decoder), "text_encoder", ...

    Warns (UserWarning) of a denoiser that is left alone, and once for each reason for which a call
    ran the original forward; both say what would help.

    Raises TypeError or ValueError for an object or an option that cannot be taken, before anything
    is changed.
    """
    pipelines.check_options(optimize, dtype, strict)
    precision = None if dtype is torch.float32 else dtype
    if not supports(obj):
        raise TypeError(_unknown(obj))
    names = components.check_also(obj, also)
    if names and not optimize:
        raise ValueError(f"also={list(names)} asks for compiled networks; it needs optimize=True")
    if pipelines.is_pipeline(obj):
        pipelines.accelerate(obj, optimize, precision, strict, names)
    elif optimize:
        denoiser.install(obj, precision)  # type: ignore[arg-type]
    else:
        raise ValueError("optimize=False leaves nothing to accelerate in a model alone")
    return obj


def restore(obj: Object) -> Object:
    """Undo `accelerate` and return the object, with the scheduler it had and no attribute left.

    One that was not accelerated stays as it is. Raises RuntimeError where another library has put
    its hooks over the forward of a model since.
    """
    if pipelines.is_pipeline(obj):
        pipelines.restore(obj)
    elif denoiser.is_denoiser(obj):
        denoiser.remove(obj)  # type: ignore[arg-type]
    else:
        raise TypeError(_unknown(obj))
    return obj


def explain(obj: Any) -> str:
    """What was exchanged and compiled, and what runs as it did and why."""
    if pipelines.is_pipeline(obj):
        return pipelines.explain(obj)
    if not denoiser.is_denoiser(obj):
        raise TypeError(_unknown(obj))
    forward = denoiser.forward_of(obj)
    return "not accelerated" if forward is None else forward.explain()


def _unknown(obj: Any) -> str:
    return f"cannot accelerate {class_name(obj)}; supported: {', '.join(SUPPORTED)}"


def __getattr__(name: str) -> Any:
    if name in pipelines.SCHEDULERS:
        return pipelines.scheduler_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
