"""The fused ops and the counter-based noise."""

from __future__ import annotations

import torch
from tests.api import world
from tests.api.case import Call
from tests.api.world import SHAPE

from stepfuse.engine.sampling.plan import step_table
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.philox import integers, normal

X, NOISE = world.images(), world.images().flip(0)
SEED = {"-1", "0"}
# the ops are traced with fake tensors: all of them are, or none
FAKES = {"as a fake tensor"}
WIDE = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def adding() -> Call:
    # the shape and the device of x0 are those that the others must have
    like = ("noise", "out", "target_out")
    return Call(
        add_noise,
        {"x0": X, "noise": NOISE, "t": 3, "alphas_cumprod": world.schedule().alphas_cumprod},
        {
            "t": {"0"}, "seed": SEED, "sample": SEED,
            "alphas_cumprod": {"of twice the entries"},
        },
        named={"x0": like},
        instead={
            "seed": 5, "sample": 2, "out": torch.empty(SHAPE), "target_out": torch.empty(SHAPE),
            "target": "epsilon",
        },
        beside={
            "seed": {"noise": None}, "sample": {"noise": None, "seed": 5},
            "target_out": {"target": "epsilon"},
        },
        raises=(IndexError,),
        undefined={
            **dict.fromkeys(("x0", "alphas_cumprod", "out", "target_out"), FAKES),
            # one of the two is given
            "noise": {*FAKES, "None"}, "seed": {"None"},
        },
    )  # fmt: skip


def denoising() -> Call:
    table = step_table(world.schedule(), [9, 5, 1], Update()).float()
    return Call(
        denoise_step,
        {"x": X, "model_output": NOISE, "table": table, "step": 1},
        {"step": {"0"}, "seed": SEED, "sample": SEED, "learned_variance": set()},
        named={
            "x": ("model_output", "table"),
            "learned_variance": ("learned variance",),
        },
        instead={
            "seed": 5, "sample": 2, "out": torch.empty(SHAPE), "x0_out": torch.empty(SHAPE),
            "uncond_output": X, "noise": X,
            "history": torch.zeros(1, *SHAPE), "history_table": torch.zeros(3, 8),
        },
        beside={
            "history": {"history_table": torch.zeros(3, 8)},
            "history_table": {"history": torch.zeros(1, *SHAPE)},
            "sample": {"seed": 5},
            "learned_variance": {"model_output": torch.zeros(2, 2, 4, 4)},
        },
        raises=(IndexError,),
        undefined={
            **dict.fromkeys(
                ("x", "model_output", "table", "uncond_output", "noise", "out", "x0_out"), FAKES
            ),
            # both are given or none
            "history": {*FAKES, "None"}, "history_table": {*FAKES, "None"},
        },
    )  # fmt: skip


def normalising() -> Call:
    vector, matrix = torch.ones(4), torch.ones(2, 4)
    return Call(
        group_norm_silu,
        {"x": WIDE, "weight": vector, "bias": vector, "groups": 2, "eps": 1e-5},
        {"eps": {"1.5", "2 ** 70"}},
        named={"x": ("weight", "groups")},
        instead={"scale": matrix, "shift": matrix, "add": matrix, "out": torch.empty_like(WIDE)},
        undefined=dict.fromkeys(("x", "weight", "bias", "scale", "shift", "add", "out"), FAKES),
    )


CALLS = {
    "add_noise.add_noise": adding,
    "denoise_step.denoise_step": denoising,
    "group_norm_silu.group_norm_silu": normalising,
    "philox.normal": lambda: Call(
        normal,
        {"seed": 1, "sample": 2, "step": 3, "shape": (3, 2)},
        {"seed": SEED, "sample": SEED, "step": {"0"}, "shape": {"an empty list", "as a list"}},
        instead={"out": torch.empty(3, 2), "device": "cpu"},
        undefined={"out": FAKES},
    ),
    "philox.integers": lambda: Call(
        integers,
        {"seed": 1, "sample": 2, "step": 3, "shape": (3, 2)},
        {"seed": SEED, "sample": SEED, "step": {"0"}, "shape": {"an empty list", "as a list"}},
    ),
}
