"""Sampler, guidance and latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.api import world
from tests.api.case import Call
from tests.api.world import SHAPE, TRAINED
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.sampling.lint import check_capturable
from stepfuse.engine.sampling.steps import Steps
from stepfuse.engine.sampling.update import Update

# negative numbers are 64-bit patterns too
SEED = {"-1", "0"}
# whatever keyword arguments the model takes; it is asked for by name
CONDITION = {"labels": torch.tensor([1, 2])}
# an argument that the model has not is refused by the model, in Python's words
UNKNOWN = {"a dict"}
# images of any number of axes are sampled: which of them the model takes, it says itself
OTHER_IMAGES = {"a tensor", "of one axis more"}
IMAGE = world.images()
STEPS: dict[str, Any] = {"steps": 2, "spacing": "leading", "steps_offset": 1}
LIST_OF_STEPS = {"as an iterator"}
LIST_OF_SIGMAS: set[str] = set()
SOLVER: dict[str, Any] = {"method": "dpmpp"}


def log_probability(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """Of a classifier, [N]."""
    return -x.flatten(1).square().sum(1)


def rows(schedule: sf.Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    """Of a method, [S, 16]."""
    return Steps.down(schedule, timesteps, update).table


def constructor() -> Call:
    return Call(
        sf.Sampler,
        {"model": world.net(), "schedule": world.schedule(), "eta": 0.5, **STEPS},
        {
            "steps_offset": {"0"},
            "timesteps": LIST_OF_STEPS,
            "eta": {"0"},
            "clip_sample": {"1.5", "2 ** 70"},
            "max_programs": {"2 ** 70"},
            "grid": LIST_OF_SIGMAS,
        },
        instead={
            "timesteps": [9, 5, 1], "clip_sample": 1.0, "max_programs": 4,
            "guidance": sf.CFG(2.0), "variance_type": "fixed_large", "graph": "step",
            "device": "cpu", "order": 2, "solver_type": "heun", "grid": "karras",
        },
        beside=dict.fromkeys(("order", "solver_type", "strict", "grid"), SOLVER | {"eta": 0.0}),
    )  # fmt: skip


def set_timesteps() -> Call:
    return Call(
        sf.Sampler(world.net(), world.schedule(), steps=2).set_timesteps,
        STEPS,
        {
            "steps_offset": {"0"}, "timesteps": LIST_OF_STEPS, "eta": {"0"},
            "grid": LIST_OF_SIGMAS,
        },
        instead={
            "timesteps": [9, 5, 1], "eta": 0.5, "method": "heun", "order": 2,
            "solver_type": "heun", "grid": "karras",
        },
        beside=dict.fromkeys(("order", "solver_type", "grid"), SOLVER),
    )  # fmt: skip


def drawing(function: Any, accepts: dict[str, set[str]], **more: Any) -> Call:
    """`sample` or `iterate`."""
    return Call(
        function,
        {"shape": SHAPE, "seed": 3, "first_index": 1, **more},
        {
            **accepts,
            "shape": {"as a list"},
            "seed": SEED,
            "first_index": SEED,
            "start": {"0"},
            "mask": {"as integers", "as truth values", "without its first axis"},
        },
        instead={
            "x_T": IMAGE, "noise": torch.zeros(2, *SHAPE), "start": TRAINED - 1, "image": IMAGE,
            "mask": torch.ones(SHAPE), "condition": CONDITION, "strength": 0.5,
            "measurement": IMAGE,
        },
        beside={
            "start": {"x_T": IMAGE}, "strength": {"image": IMAGE}, "mask": {"image": IMAGE},
        },
        undefined={"condition": UNKNOWN},
    )  # fmt: skip


def bounding() -> Call:
    return Call(
        sf.bits_per_dim,
        {
            "model": world.net(), "schedule": world.schedule(), "x0": -torch.ones(SHAPE),
            "seed": 3, "first_index": 1, "timesteps": [9, 5, 1], "batch_size": 2,
        },
        {
            "timesteps": LIST_OF_STEPS,
            "clip_sample": {"1.5", "2 ** 70"},
            "seed": SEED,
            "first_index": SEED,
            "batch_size": {"2 ** 70"},
        },
        # how many images there are, and how large, the other arguments are asked
        named={"x0": ("first_index", "x")},
        undefined={"condition": UNKNOWN, "x0": OTHER_IMAGES},
        instead={
            "condition": CONDITION, "clip_sample": 1.0, "noise": torch.zeros(3, *SHAPE),
            "variance_type": "fixed_small", "graph": "step", "device": "cpu",
        },
    )  # fmt: skip


def bound() -> sf.Bound:
    return sf.bits_per_dim(
        world.net(), world.schedule(), -torch.ones(SHAPE), timesteps=[9, 5, 1], graph=None
    )


CALLS = {
    "bits_per_dim": bounding,
    "Bound.step_after": lambda: Call(bound().step_after, {"fraction": 0.5}, {"fraction": {"0"}}),
    "Sampler": constructor,
    "Sampler.set_timesteps": set_timesteps,
    "Sampler.sample": lambda: drawing(
        world.sampler().sample, {"batch_size": {"2 ** 70"}}, batch_size=2
    ),
    "Sampler.iterate": lambda: drawing(world.sampler().iterate, {}),
    "Sampler.encode": lambda: Call(
        world.sampler().encode,
        {"x0": IMAGE},
        {"clip_sample": {"1.5", "2 ** 70"}},
        undefined={"x0": OTHER_IMAGES, "condition": UNKNOWN},
        instead={"condition": CONDITION, "clip_sample": 1.0},
    ),
    "Sampler.decode": lambda: Call(
        world.sampler().decode,
        {"z": IMAGE},
        instead={"condition": CONDITION},
        undefined={"z": OTHER_IMAGES, "condition": UNKNOWN},
    ),
    "Sampler.explain": lambda: Call(world.sampler().explain, {}),
    "Sampler.refresh": lambda: Call(world.sampler().refresh, {}),
    "Sampler.reset": lambda: Call(world.sampler().reset, {}),
    "Sampler.stats": lambda: Call(world.sampler().stats, {}),
    "CFG": lambda: Call(
        sf.CFG,
        {"scale": 2.0, "unconditional": {"labels": None}, "rescale": 0.5, "interval": (1, 5)},
        {
            "scale": {"-1", "0", "1.5", "2 ** 70"},
            "unconditional": {"a dict"},
            "rescale": {"0"},
            "interval": {"as a list", "a list", "with a fraction inside"},
        },
    ),
    "ClassifierGuidance": lambda: Call(
        sf.ClassifierGuidance,
        {"fn": log_probability, "scale": 2.0},
        {"scale": {"-1", "0", "1.5", "2 ** 70"}},
    ),
    "Method": lambda: Call(
        sf.Method,
        {"rows": rows, "takes": ("eta",), "predictions": ("sample",), "name": "mine"},
        {
            "takes": {"as a list", "an empty list"},
            "predictions": {"as a list"},
            "name": {"a text", "an empty text"},
        },
        instead={"shifts_mean": True},
    ),
    "slerp": lambda: Call(
        sf.slerp,
        {"a": IMAGE, "b": IMAGE.flip(0), "weight": 0.5},
        {"weight": {"-1", "0", "1.5", "2 ** 70"}},
        named={"b": ("a",)},
    ),
    "interpolate": lambda: Call(
        sf.interpolate,
        {"sampler": world.sampler(), "xa": IMAGE, "xb": IMAGE.flip(0), "weight": 0.5, "t": 15},
        {"weight": {"-1", "0", "1.5", "2 ** 70"}, "seed": SEED, "t": {"0"}},
        named={"xb": ("xa",)},
        undefined={"condition": UNKNOWN},
        instead={"condition": CONDITION, "seed": 1},
    ),
    "lint.check_capturable": lambda: Call(
        check_capturable,
        {"sampler": world.sampler(), "shape": SHAPE},
        {"shape": {"as a list"}},
        undefined={"condition": UNKNOWN},
        instead={"condition": CONDITION},
    ),
}
