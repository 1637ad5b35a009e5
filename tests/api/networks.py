"""Checkpoints, `optimize`, and the adapters of other libraries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tests.api import world
from tests.api.case import Call
from tests.api.values import labels
from tests.engine.adapters import guided_diffusion_case, lucidrains_case
from tests.engine.adapters.diffusers_models import least_unet2d

import stepfuse as sf
from stepfuse.engine import adapters
from stepfuse.engine.adapters import diffusers, guided_diffusion, lucidrains

INPUTS = (world.images(), torch.tensor([3, 4]))
# the object is named by its class
OBJECT = {"obj": ("cannot accelerate",)}


def checkpoint() -> Call:
    known = world.checkpoint()
    return Call(
        sf.Checkpoint,
        {
            "model": known.model, "schedule": known.schedule, "prediction_type": "epsilon",
            "sample_shape": (1, 8, 8), "labels": known.labels, "training": {}, "card": "",
        },
        {
            "sample_shape": {"as a list"},
            "labels": {"an empty list", "as a list", "with a text inside"},
            "training": {"a dict"},
            "card": {"a text", "an empty text"},
        },
    )  # fmt: skip


def optimizing() -> Call:
    return Call(
        sf.optimize,
        {"model": world.net(), "example_inputs": INPUTS, "weights": "kept"},
        {
            "passes": {"an empty list"},
            "without": {"an empty list"},
            "timesteps": {"an empty list", "as an iterator", "a set"},
            "max_networks": {"2 ** 70"},
        },
        instead={
            "passes": sf.PASSES,
            "without": ("channels_last",),
            "timesteps": [3, 4],
            "max_networks": 8,
        },
        # what follows x are the model's own arguments
        undefined={
            "example_inputs": {
                "with None inside", "with a text inside", "with a fraction inside", "as a list",
            }
        },
    )  # fmt: skip


def fast() -> Any:
    return sf.optimize(world.net(), INPUTS, weights="kept")


def accelerating(function: Any, obj: Any) -> Call:
    return Call(function, {"obj": obj, "optimize": True}, named=OBJECT)


def looking(function: Any, obj: Any) -> Call:
    return Call(function, {"obj": obj}, named=OBJECT)


def supporting(module: Any, obj: Any) -> Call:
    """Whatever it is: the answer is yes or no."""
    return Call(module.supports, {"obj": obj}, {"obj": labels(obj)})


CALLS = {
    "models": lambda: Call(sf.models, {}),
    "Checkpoint.decode": lambda: Call(world.checkpoint().decode, {"x": world.images()}),
    "Checkpoint.sampler": lambda: Call(
        world.checkpoint().sampler,
        {"steps": 2, "eta": 0.5, "clip_sample": 1.0, "graph": "step"},
        {
            "steps": {"None", "a numpy integer"},
            "eta": {"None", "0", "a numpy float"},
            "clip_sample": {"None", "1.5", "2 ** 70", "a numpy float"},
            "graph": {"None"},
        },
    ),
    "Normalization": lambda: Call(
        sf.Normalization,
        {"mean": (0.5,), "std": (0.2,)},
        {
            "mean": {"as an iterator", "as a list", "with a fraction inside"},
            "std": {"as an iterator", "as a list", "with a fraction inside"},
        },
        named={"mean": ("std",), "std": ("mean",)},
    ),
    "Normalization.decode": lambda: Call(
        sf.Normalization((0.5,), (0.2,)).decode, {"x": world.images()}
    ),
    "Normalization.encode": lambda: Call(
        sf.Normalization((0.5,), (0.2,)).encode, {"pixels": world.images().abs()}
    ),
    "SamplingDefaults": lambda: Call(
        sf.SamplingDefaults,
        {"method": "ddim", "steps": 20, "spacing": "trailing", "eta": 0.5},
        {"steps": {"a text", "2 ** 70"}, "eta": {"0"}},
    ),
    "load": lambda: Call(
        sf.load,
        {"name_or_path": world.checkpoint_file()},
        named={"name_or_path": ("unknown checkpoint",)},
    ),
    "Checkpoint": checkpoint,
    "optimize": optimizing,
    "Optimized.prepare": lambda: Call(
        fast().prepare,
        {"timesteps": [3, 4]},
        {"timesteps": {"an empty list", "a set", "as an iterator"}},
    ),
    "Optimized.check_weights": lambda: Call(fast().check_weights, {}),
    "Optimized.explain": lambda: Call(fast().explain, {"graph": "main"}),
    "Optimized.refresh": lambda: Call(fast().refresh, {}),
    "accelerate": lambda: looking(sf.accelerate, lucidrains_case.bump()),
    "restore": lambda: looking(sf.restore, lucidrains_case.bump()),
    "adapters.explain": lambda: looking(adapters.explain, lucidrains_case.bump()),
    "lucidrains.accelerate": lambda: accelerating(lucidrains.accelerate, lucidrains_case.bump()),
    "lucidrains.restore": lambda: looking(lucidrains.restore, lucidrains_case.bump()),
    "lucidrains.explain": lambda: looking(lucidrains.explain, lucidrains_case.bump()),
    "lucidrains.supports": lambda: supporting(lucidrains, lucidrains_case.bump()),
    "guided_diffusion.accelerate": lambda: accelerating(
        guided_diffusion.accelerate, guided_diffusion_case.diffusion()
    ),
    "guided_diffusion.restore": lambda: looking(
        guided_diffusion.restore, guided_diffusion_case.diffusion()
    ),
    "guided_diffusion.explain": lambda: looking(
        guided_diffusion.explain, guided_diffusion_case.diffusion()
    ),
    "guided_diffusion.supports": lambda: supporting(
        guided_diffusion, guided_diffusion_case.diffusion()
    ),
    "diffusers.accelerate": lambda: replace(
        accelerating(diffusers.accelerate, least_unet2d()), accepts={"also": {"an empty list"}}
    ),
    "diffusers.restore": lambda: looking(diffusers.restore, least_unet2d()),
    "diffusers.explain": lambda: looking(diffusers.explain, least_unet2d()),
    "diffusers.supports": lambda: supporting(diffusers, least_unet2d()),
}
