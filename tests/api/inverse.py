"""Operators of inverse problems, and the guidance that asks them."""

from __future__ import annotations

import torch
from tests.api import world
from tests.api.case import Call

import stepfuse as sf
from stepfuse import inverse

IMAGE = world.images()
NUMBERS = {"0", "1.5", "2 ** 70"}


class Physics:
    """Somebody else's operator."""

    A = A_adjoint = staticmethod(torch.negative)


def blur() -> inverse.Blur:
    """One for images of 4x4."""
    return inverse.Blur(1.0)


CALLS = {
    "inverse.Mask": lambda: Call(
        inverse.Mask,
        {"mask": torch.ones(1, 4, 4)},
        {
            "mask": {
                "a tensor", "of one axis more", "without its first axis", "of twice the entries",
                "as truth values", "as integers",
            }
        },
    ),
    "inverse.Outpaint": lambda: Call(
        inverse.Outpaint, {"pad": 1},
    ),
    "inverse.Downsample": lambda: Call(
        inverse.Downsample, {"factor": 2}, {"factor": {"2 ** 70"}}
    ),
    "inverse.Blur": lambda: Call(inverse.Blur, {"sigma": 2.0}, {"sigma": {"1.5"}}),
    "inverse.Radon": lambda: Call(inverse.Radon, {"angles": 3}),
    "inverse.Dense": lambda: Call(
        inverse.Dense,
        {"matrix": torch.ones(3, 4), "shape": (1, 2, 2)},
        {"shape": {"as a list"}},
        named={"matrix": ("shape",)},
    ),
    "inverse.Foreign": lambda: Call(
        inverse.Foreign, {"physics": Physics()}, {"iterations": {"2 ** 70"}}
    ),
    "PiGDM": lambda: Call(
        sf.PiGDM,
        {"A": blur(), "noise": 0.1, "data_std": 0.5},
        {"noise": NUMBERS, "data_std": {"1.5", "2 ** 70"}},
        instead={"cfg": sf.CFG(2.0)},
    ),
    "DPS": lambda: Call(
        sf.DPS, {"A": blur(), "scale": 0.5}, {"scale": NUMBERS}, instead={"cfg": sf.CFG(2.0)}
    ),
    "inverse.Blur.adjoint": lambda: Call(blur().adjoint, {"y": IMAGE}),
    "inverse.Blur.pinv": lambda: Call(blur().pinv, {"y": IMAGE}),
    "inverse.Blur.solve": lambda: Call(
        blur().solve,
        {"r": IMAGE, "r2": 0.5, "noise": 0.1},
        {"r2": NUMBERS, "noise": NUMBERS},
        named={"r": ("y",)},
    ),
}  # fmt: skip
