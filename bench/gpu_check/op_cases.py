"""Calls of every op that runs on CUDA, each compared with its float64 reference on the CPU."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepfuse.bench.gpu_check.against import Layout, Poisoned, off, placed
from stepfuse.bench.gpu_check.denoise_cases import NORMAL, VARIANTS, Variant, denoise
from stepfuse.kernels import philox
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.reference.group_norm_silu import formula

# A normalised activation is below about 6 in size: a few units in the last place of that, from sums
# in parts, a reciprocal root and an approximated exp.
NORMALISED = 6e-6
# A gradient is a sum of terms of size 1 that may cancel: relative to the largest of its tensor.
GRADIENT = 2e-5
ADDED = 5 * 2.0**-24  # of add_noise: two products and a sum of coefficients that are rounded once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
# one sample of an odd size, and samples of a size that takes wide accesses
IMAGES = ((1, 3, 31, 33), (3, 4, 16, 16))
# shape, groups: channels no power of two, one pixel, odd sizes, one pass and split
NORMS = (
    ((1, 3, 31, 33), 1),
    ((2, 60, 7, 9), 4),
    ((2, 64, 1, 1), 32),
    ((1, 320, 8, 8), 32),
    ((1, 960, 33, 32), 32),
    ((2, 320, 64, 64), 32),
)
SPLIT = ((1, 8, 65, 67), 1)  # about the smallest that no tile holds
PARAMETERS = ("weight", "bias", "scale", "shift", "add")
TIMESTEPS = 1000


@dataclass(frozen=True)
class Place:
    """Where a case runs: a device, and the backend that is asked for."""

    device: torch.device
    backend: str


@dataclass(frozen=True)
class Case:
    """One or a few calls of an op.

    Args:
        op: its name.
        name: of the case, with dtype, layout and shape.
        run: makes the calls and returns a line for whatever is wrong.
    """

    op: str
    name: str
    run: Callable[[Place], list[str]]


def cases() -> list[Case]:
    """All of them, in the order of the ops."""
    return [
        *_add_noise(),
        *_denoise_step(),
        *_group_norm_silu(),
        *_gradients(),
        *smallest(),
        *_philox(),
    ]


def smallest() -> list[Case]:
    """A group norm in two passes and an update with all its parts, for tools that are slow."""
    shape, groups = SPLIT
    norms = [norm_case(shape, groups, torch.bfloat16, layout, PARAMETERS) for layout in LAYOUTS]
    shape, variant = IMAGES[0], VARIANTS[-1]
    name = _label("small", variant.name, shape)
    update = partial(_stepped, name, variant, shape, torch.bfloat16, "contiguous")
    return [*norms, Case("denoise_step", name, update)]


def seeded(name: str) -> torch.Generator:
    """The numbers of a case: the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _label(*parts: Any) -> str:
    return " ".join(
        "x".join(map(str, part)) if isinstance(part, tuple) else str(part).removeprefix("torch.")
        for part in parts
    )


def _add_noise() -> Iterator[Case]:
    for shape, dtype, layout, drawn, target in itertools.product(
        (*IMAGES, (5, 2)), DTYPES, LAYOUTS, (False, True), (None, "v_prediction")
    ):
        how = "drawn" if drawn else "given"
        name = _label(shape, dtype, layout, how, target or "no target")
        if not (layout == "channels_last" and len(shape) < 3):
            yield Case(
                "add_noise", name, partial(_noised, name, shape, dtype, layout, drawn, target)
            )


def _noised(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    drawn: bool,
    target: Any,
    place: Place,
) -> list[str]:
    g = seeded(name)
    x0 = placed(torch.randn(shape, generator=g).to(dtype), layout)
    t = torch.randint(0, TIMESTEPS, shape[:1], generator=g)
    t[-1], t[0] = TIMESTEPS - 1, 0
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64), 0)
    given: dict[str, Any] = {"noise": placed(torch.randn(shape, generator=g).to(dtype), layout)}
    eps, draw = given["noise"].double(), 0.0
    if drawn:
        numbers = torch.randint(-(2**63), 2**63 - 1, (2, *shape[:1]), generator=g)
        given = {"noise": None, "seed": numbers[0], "sample": numbers[1]}
        eps, draw = philox.normal(*numbers, t, shape[1:], "reference", dtype=torch.float64), NORMAL
    x0_there, sent = x0.to(place.device), moved(given, place.device)
    out, goal = Poisoned(x0_there), Poisoned(x0_there)
    sent |= {"t": t.to(place.device), "alphas_cumprod": abar.to(place.device)}
    sent |= {"target": target, "backend": place.backend}
    target_out = None if target is None else goal.tensor
    add_noise(x0_there, **sent, out=out.tensor, target_out=target_out)
    at = abar[t].view(-1, *[1] * (x0.dim() - 1))
    signal, sigma, wide = at.sqrt(), (1 - at).sqrt(), x0.double()
    allowed = ADDED * (signal * wide.abs() + sigma * eps.abs()) + sigma * draw
    found = out.problems("x_t") + off("x_t", out.tensor, signal * wide + sigma * eps, allowed)
    if target is not None:
        allowed = ADDED * (signal * eps.abs() + sigma * wide.abs()) + signal * draw
        found += goal.problems("v") + off("v", goal.tensor, signal * eps - sigma * wide, allowed)
    add_noise(x0_there, **sent, inplace=True)
    if not torch.equal(x0_there, out.tensor):
        found.append("in place differs from out of place")
    return found


def _denoise_step() -> Iterator[Case]:
    for variant, shape, dtype, layout in itertools.product(VARIANTS, IMAGES, DTYPES, LAYOUTS):
        name = _label(variant.name, shape, dtype, layout)
        yield Case("denoise_step", name, partial(_stepped, name, variant, shape, dtype, layout))


def _stepped(
    name: str,
    variant: Variant,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    place: Place,
) -> list[str]:
    return denoise(variant, shape, dtype, layout, place.device, place.backend, seeded(name))


def _group_norm_silu() -> Iterator[Case]:
    for (shape, groups), dtype, layout in itertools.product(NORMS, DTYPES, LAYOUTS):
        yield norm_case(shape, groups, dtype, layout, PARAMETERS)
    for names in ((), ("weight", "bias"), ("scale", "shift")):
        yield norm_case((2, 60, 7, 9), 4, torch.float32, "contiguous", names, "none")


def norm_case(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    layout: Layout,
    names: Sequence[str],
    act: str = "silu",
) -> Case:
    """`group_norm_silu` with these optional tensors, into another tensor and in place."""
    name = _label(shape, groups, dtype, layout, act, "-".join(names))
    run = partial(_normed, name, shape, groups, dtype, layout, names, act)
    return Case("group_norm_silu", name, run)


def _normed(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    layout: Layout,
    names: Sequence[str],
    act: Any,
    place: Place,
) -> list[str]:
    given = norm_arguments(shape, groups, dtype, layout, names, seeded(name))
    sent = moved(given, place.device) | {"act": act, "backend": place.backend}
    out = Poisoned(sent["x"])
    group_norm_silu(**sent, out=out.tensor)
    exact = formula(**doubled(given), eps=1e-5, silu=act == "silu")
    gain = 1.0
    for name in ("weight", "scale"):
        gain *= 1.0 if given[name] is None else 1 + float(given[name].abs().max())
    found = out.problems("y") + off("y", out.tensor, exact, NORMALISED * gain)
    group_norm_silu(**sent, out=sent["x"])
    if not torch.equal(sent["x"], out.tensor):
        found.append("in place differs from out of place")
    return found


def _gradients() -> Iterator[Case]:
    for (shape, groups), dtype, layout in itertools.product(NORMS[:3], DTYPES, LAYOUTS):
        name = _label("gradients", shape, groups, dtype, layout)
        run = partial(_differentiated, name, shape, groups, dtype, layout)
        yield Case("group_norm_silu", name, run)
    shape, groups = NORMS[-1]
    name = _label("gradients", shape, groups, "float32 channels_last")
    run = partial(_differentiated, name, shape, groups, torch.float32, "channels_last")
    yield Case("group_norm_silu", name, run)


def _differentiated(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    layout: Layout,
    place: Place,
) -> list[str]:
    g = seeded(name)
    given = norm_arguments(shape, groups, dtype, layout, PARAMETERS, g)
    dy = placed(torch.randn(shape, generator=g).to(dtype), layout)
    sent = moved(given, place.device)
    leaves = {k: v.requires_grad_() for k, v in sent.items() if isinstance(v, Tensor)}
    group_norm_silu(**sent, backend=place.backend).backward(dy.to(place.device))
    wide = {
        k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in doubled(given).items()
    }
    formula(**wide, eps=1e-5, silu=True).backward(dy.double())
    h = given["x"].double() + given["add"].double().view(*shape[:2], *[1] * (len(shape) - 2))
    variance = h.reshape(shape[0], groups, -1).var(-1, correction=0)
    rstd = float((variance + 1e-5).rsqrt().max())
    found = []
    for name, leaf in leaves.items():
        exact = wide[name].grad
        size = max(1.0, float(exact.abs().max()), rstd if name in ("x", "add") else 0.0)
        found += off(f"the gradient of {name}", leaf.grad, exact, GRADIENT * size)
    return found


def norm_arguments(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    layout: Layout,
    names: Sequence[str],
    generator: torch.Generator,
) -> dict[str, Any]:
    """Keyword arguments of one call of `group_norm_silu`; ``names`` are the tensors it has."""
    given: dict[str, Any] = {"groups": groups}
    given["x"] = placed(torch.randn(shape, generator=generator).to(dtype), layout)
    for name in PARAMETERS:
        size = shape[1:2] if name in ("weight", "bias") else shape[:2]
        value = (name == "weight") + 0.5 * torch.randn(size, generator=generator)
        given[name] = value.to(dtype) if name in names else None
    return given


def _philox() -> Iterator[Case]:
    for shape, dtype in itertools.product(((3, 7, 9), (4, 16, 16), (5,)), DTYPES):
        name = _label("normal", shape, dtype)
        yield Case("philox", name, partial(_drawn, name, shape, dtype))
    yield Case("philox", "bits", _bits)


def _drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> list[str]:
    seeds, samples = torch.randint(-(2**63), 2**63 - 1, (2, 3), generator=seeded(name))
    steps = torch.tensor([0, 999, philox.INITIAL])
    exact = philox.normal(seeds, samples, steps, shape, "reference", dtype=torch.float64)
    out = Poisoned(torch.empty((3, *shape), dtype=dtype, device=place.device))
    counters = (v.to(place.device) for v in (seeds, samples, steps))
    philox.normal(*counters, shape, place.backend, dtype=dtype, out=out.tensor)
    return out.problems("z") + off("z", out.tensor, exact, NORMAL)


def _bits(place: Place) -> list[str]:
    """The integers of the reference on the device are those of the CPU."""
    seeds, samples = torch.randint(-(2**63), 2**63 - 1, (2, 4), generator=seeded("bits"))
    here = philox.integers(seeds, samples, 7, (3, 5, 7), "reference")
    there = philox.integers(seeds.to(place.device), samples.to(place.device), 7, (3, 5, 7))
    return [] if torch.equal(here, there.cpu()) else ["the integers differ from the CPU's"]


def moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments with copies of their tensors on ``device``, strides kept."""
    return {
        name: torch.empty_like(v, device=device).copy_(v) if isinstance(v, Tensor) else v
        for name, v in given.items()
    }


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with their tensors in float64."""
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in given.items()}
