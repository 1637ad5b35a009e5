"""diffusers' pipelines: their scheduler exchanged for ours, their U-Net given another forward.

The loop stays the pipeline's own, so that its callbacks, generators, progress bar and outputs do.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

import stepfuse.engine.adapters.diffusers.unet as unets
from stepfuse.engine.adapters.patch import NAME
from stepfuse.kernels.arguments import check_precision
from stepfuse.kernels.checks import check_flag

CLASSES = (
    "DDPMPipeline",
    "DDIMPipeline",
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "LDMTextToImagePipeline",
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
_SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDIMInverseScheduler": "ddim_inverse",
}


class Changes:
    """What `accelerate` changed in a pipeline, kept in its ``__dict__`` until `restore`."""

    def __init__(self) -> None:
        self.theirs: Any = None  # the scheduler that was there
        self.ours: Any = None
        self.unet: nn.Module | None = None  # whose forward was exchanged by this pipeline
        self.notes: dict[str, str] = {}  # part -> why it was left alone


def is_pipeline(obj: Any) -> bool:
    """Whether ``obj`` is one of `CLASSES`, found without importing diffusers."""
    return any(
        kind.__name__ in CLASSES and kind.__module__.partition(".")[0] == "diffusers"
        for kind in type(obj).__mro__
    )


def changes_of(pipe: Any) -> Changes | None:
    """What was changed in this pipeline, None where nothing was."""
    found = vars(pipe).get(NAME)
    return found if isinstance(found, Changes) else None


def check_options(optimize: Any, dtype: Any, strict: Any) -> None:
    """Raise TypeError or ValueError for options that cannot be meant."""
    check_flag("optimize", optimize)
    check_flag("strict", strict)
    check_precision("dtype", dtype)
    if dtype is not None and not optimize:
        raise ValueError(f"dtype={dtype} is that of the compiled U-Net; it needs optimize=True")


def accelerate(pipe: Any, optimize: bool, dtype: torch.dtype | None, strict: bool) -> None:
    """Exchange what can be; a pipeline that was accelerated before gets these options."""
    changes = changes_of(pipe) or Changes()
    _exchange_scheduler(pipe, changes, strict)
    _exchange_forward(pipe, changes, optimize, dtype)
    vars(pipe)[NAME] = changes


def restore(pipe: Any) -> None:
    """Put back what was there, the same objects.

    What the user exchanged since stays: a scheduler or a U-Net assigned after `accelerate`.
    Raises RuntimeError where somebody hides the forward.
    """
    changes = changes_of(pipe)
    if changes is None:
        return
    _release(changes)
    if changes.ours is not None and pipe.scheduler is changes.ours:
        vars(pipe)["scheduler"] = changes.theirs
    del vars(pipe)[NAME]


def explain(pipe: Any) -> str:
    """What was exchanged and compiled in this pipeline, and what was left alone and why."""
    changes = changes_of(pipe)
    if changes is None:
        return "not accelerated"
    lines = []
    if changes.ours is not None and pipe.scheduler is changes.ours:
        how = "" if changes.ours.strict else ", strict=False"
        lines.append(f"scheduler              {type(changes.ours).__name__} by denoise_step{how}")
    elif "scheduler" in changes.notes and not _is_ours(pipe.scheduler):
        lines.append(f"scheduler              left alone: {_left_alone(pipe.scheduler)}")
    forward = unets.forward_of(pipe.unet) if isinstance(pipe.unet, nn.Module) else None
    if forward is not None:
        lines.append(forward.explain())
    elif "unet" in changes.notes:
        lines.append(f"unet                   left alone: {changes.notes['unet']}")
    return "\n".join(lines)


def _exchange_scheduler(pipe: Any, changes: Changes, strict: bool) -> None:
    current = pipe.scheduler
    if _is_ours(current):
        current.strict = strict
        return
    home = _SCHEDULERS.get(type(current).__name__)
    if home is None or not type(current).__module__.startswith("diffusers.schedulers."):
        changes.notes["scheduler"] = _left_alone(current)
        return
    module = importlib.import_module(f"stepfuse.engine.adapters.diffusers.{home}")
    ours = getattr(module, type(current).__name__).from_config(current.config)
    # timesteps, and tables that were moved to a device or set by hand
    for name in vars(ours).keys() & vars(current).keys():
        vars(ours)[name] = vars(current)[name]
    ours.strict = strict
    changes.theirs, changes.ours = current, ours
    # not by setattr, by which the pipeline would write another library into its configuration
    vars(pipe)["scheduler"] = ours


def _exchange_forward(
    pipe: Any, changes: Changes, optimize: bool, dtype: torch.dtype | None
) -> None:
    changes.notes.pop("unet", None)
    if changes.unet is not None and (not optimize or changes.unet is not pipe.unet):
        _release(changes)
    reason = unets.obstacle(pipe.unet) if optimize else "optimize=False"
    if reason is not None:
        changes.notes["unet"] = reason
        return
    had = unets.forward_of(pipe.unet) is not None
    unets.install(pipe.unet, dtype).listed.add(pipe)
    if not had:
        changes.unet = pipe.unet


def _release(changes: Changes) -> None:
    """Take away the forward that this pipeline gave, unless somebody restored the U-Net itself."""
    if changes.unet is not None and not unets.is_plain(changes.unet):
        unets.remove(changes.unet)
    changes.unet = None


def _is_ours(scheduler: Any) -> bool:
    return type(scheduler).__module__.startswith("stepfuse.")


def _left_alone(scheduler: Any) -> str:
    return f"{type(scheduler).__name__} is none of {', '.join(_SCHEDULERS)} of diffusers"
