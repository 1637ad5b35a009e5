"""diffusers' pipelines: their scheduler exchanged for ours, their denoisers given another forward.

The loop stays the pipeline's own, so that its callbacks, generators, progress bar and outputs do.
Nothing depends on which pipeline it is, but on what it holds: every component whose forward takes a
timestep is a denoiser (`stepfuse.engine.adapters.diffusers.denoiser`), whatever its name.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import nn

import stepfuse.engine.adapters.diffusers.components as components
import stepfuse.engine.adapters.diffusers.denoiser as denoiser
from stepfuse.engine.adapters.patch import NAME
from stepfuse.kernels.arguments import check_precision
from stepfuse.kernels.checks import check_flag

SUPPORTED = "pipelines of diffusers with such a model, its `unet` or `transformer` mostly"
SCHEDULERS = {  # the module that has ours of the same name
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDIMInverseScheduler": "ddim_inverse",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm_multistep",
    "UniPCMultistepScheduler": "unipc_multistep",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "consistency",
    "TCDScheduler": "consistency",
}


class Changes:
    """What `accelerate` changed in a pipeline, kept in its ``__dict__`` until `restore`."""

    def __init__(self) -> None:
        self.theirs: Any = None  # the scheduler that was there
        self.ours: Any = None
        self.models: dict[str, nn.Module] = {}  # whose forward was exchanged by this pipeline
        self.also: tuple[str, ...] = ()  # components beside the denoisers
        self.notes: dict[str, str] = {}  # part -> why it was left alone


def is_pipeline(obj: Any) -> bool:
    """Whether ``obj`` is a pipeline of diffusers with a denoiser, found without importing diffusers

    One whose ``unet`` or ``transformer`` cannot be taken is one, too, which says why.
    """
    return _is_of_diffusers(obj) and (
        bool(components.denoisers(obj)) or changes_of(obj) is not None
    )


def _is_of_diffusers(obj: Any) -> bool:
    return any(
        kind.__name__ == "DiffusionPipeline" and kind.__module__.partition(".")[0] == "diffusers"
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
        raise ValueError(f"dtype={dtype} is that of compiled networks; it needs optimize=True")


def accelerate(
    pipe: Any, optimize: bool, dtype: torch.dtype | None, strict: bool, also: tuple[str, ...]
) -> None:
    """Exchange what can be; a pipeline that was accelerated before gets these options.

    Warns of every model that stays as it is although it was to be compiled.
    """
    changes = changes_of(pipe) or Changes()
    changes.also = also
    _exchange_scheduler(pipe, changes, strict)
    _exchange_forwards(pipe, changes, optimize, dtype)
    vars(pipe)[NAME] = changes
    for name in components.chosen(pipe, also) if optimize else ():
        if name in changes.notes:
            what = f"the {name} of {type(pipe).__name__} is left alone and runs as it is"
            warnings.warn(f"stepfuse: {what}: {changes.notes[name]}", stacklevel=4)


def restore(pipe: Any) -> None:
    """Put back what was there, the same objects.

    What the user exchanged since stays: a scheduler or a model assigned after `accelerate`.
    Raises RuntimeError where somebody hides a forward, before anything is changed.
    """
    changes = changes_of(pipe)
    if changes is None:
        return
    for model in changes.models.values():
        denoiser.check_removable(model)
    for name in list(changes.models):
        _release(changes, name)
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
    elif "scheduler" in changes.notes and not _is_ours(_scheduler(pipe)):
        reason = _left_alone(_scheduler(pipe)) or "exchanged since"
        lines.append(f"scheduler              left alone: {reason}")
    for name, model in components.chosen(pipe, changes.also).items():
        forward = denoiser.forward_of(model)
        if forward is not None:
            lines += [f"{name:<22} {type(model).__name__}", forward.explain()]
        elif name in changes.notes:
            lines.append(f"{name:<22} left alone: {changes.notes[name]}")
    return "\n".join(lines)


def _exchange_scheduler(pipe: Any, changes: Changes, strict: bool) -> None:
    current = _scheduler(pipe)
    if _is_ours(current):
        current.strict = strict
        return
    reason = _left_alone(current)
    if reason is not None:
        changes.notes["scheduler"] = reason
        return
    ours = scheduler_class(type(current).__name__).taken_over(current, strict)
    changes.theirs, changes.ours = current, ours
    # not by setattr, by which the pipeline would write another library into its configuration
    vars(pipe)["scheduler"] = ours


def _exchange_forwards(
    pipe: Any, changes: Changes, optimize: bool, dtype: torch.dtype | None
) -> None:
    models = components.chosen(pipe, changes.also)
    for name in list(changes.models):
        if not optimize or changes.models[name] is not models.get(name):
            _release(changes, name)
    for name, model in models.items():
        changes.notes.pop(name, None)
        reason = None if optimize else "optimize=False"
        if reason is None and name in components.USUAL:
            reason = denoiser.why_no_denoiser(model)
        reason = reason or denoiser.obstacle(model)
        if reason is not None:
            changes.notes[name] = reason
            continue
        had = denoiser.forward_of(model) is not None
        denoiser.install(model, dtype).listed.add(pipe)
        if not had:
            changes.models[name] = model


def _release(changes: Changes, name: str) -> None:
    """Take away the forward that this pipeline gave, unless somebody restored the model itself."""
    model = changes.models[name]
    if not denoiser.is_plain(model):
        denoiser.remove(model)
    del changes.models[name]


def _scheduler(pipe: Any) -> Any:
    return getattr(pipe, "scheduler", None)


def _is_ours(scheduler: Any) -> bool:
    return type(scheduler).__module__.startswith("stepfuse.")


def _left_alone(scheduler: Any) -> str | None:
    """Why this scheduler stays; None where one of ours takes its place."""
    kind = type(scheduler)
    if kind.__name__ not in SCHEDULERS or not kind.__module__.startswith("diffusers.schedulers."):
        return f"{kind.__name__} is none of {', '.join(SCHEDULERS)} of diffusers"
    reason: str | None = scheduler_class(kind.__name__).refusal(scheduler.config)
    return None if reason is None else f"{kind.__name__}: {reason}"


def scheduler_class(name: str) -> Any:
    """Ours of the `SCHEDULERS`; they need diffusers and are imported when they are asked for."""
    return getattr(importlib.import_module(f"{__package__}.{SCHEDULERS[name]}"), name)
