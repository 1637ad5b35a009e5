"""group_norm_silu, forward and backward, on every backend against the float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    COMPILED,
    INTERPRETER,
    MODES,
    SIMULATED,
    Layout,
    Poisoned,
    across,
    assert_within,
    everywhere,
    random_like,
)
from torch import Tensor

from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.reference.group_norm_silu import formula

# A normalised activation is below about 6 in size and multiplied by parameters near 1; sums of
# 10^5 float32 terms in partial sums, a reciprocal root and an approximated exp leave a few units
# in the last place of that.
NORMALISED = 6e-6
# At a mean of 1e4 float32 has a spacing of 1e-3: the mean is off by a unit or a few (half a unit
# for its own rounding, the rest from summation), and with it every centred value, of standard
# deviation 1. Squares without a shift would be off by 1e8 * 2^-24 = 6 in the variance.
LARGE_MEAN = 4e-3
# A gradient is a sum over a group, or over a batch of images, of terms of size 1 that may cancel:
# relative to the largest of its tensor, or to 1. The gradient of h carries a factor rstd.
GRADIENT = 2e-5

PARAMETERS = ("weight", "bias", "scale", "shift", "add")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# shape, groups: one group of 3 channels, HW of 1, odd sizes, the channel counts of ADM and of
# Stable Diffusion, and 0 to 3 spatial dimensions
SHAPES = [
    ((1, 3, 31, 33), 1),
    ((2, 64, 1, 1), 32),
    ((2, 32, 7, 9), 32),
    ((1, 192, 5, 5), 32),
    ((1, 320, 8, 8), 32),
    ((1, 640, 7, 3), 32),
    ((1, 960, 4, 4), 32),
    ((3, 32), 8),
    ((2, 24, 17), 4),
    ((1, 16, 3, 5, 7), 8),
]
# the same channels a group, but few groups: the interpreter takes its time for each of them
FEW_GROUPS = [
    ((1, 3, 31, 33), 1),
    ((2, 4, 1, 1), 2),
    ((2, 1, 7, 9), 1),
    ((1, 12, 5, 5), 2),
    ((1, 20, 8, 8), 2),
    ((1, 40, 7, 3), 2),
    ((1, 960, 2, 2), 4),
    ((2, 8), 2),
    ((2, 12, 17), 2),
    ((1, 4, 3, 5, 7), 2),
]
LARGE = [((2, 320, 64, 64), 32), ((2, 8, 256, 256), 4), ((4, 128, 32, 32), 32)]


def arguments(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    layout: Layout = "contiguous",
    names: tuple[str, ...] = PARAMETERS,
) -> dict[str, Any]:
    """Keyword arguments of one call; ``names`` are the optional tensors it has."""
    count, channels = shape[:2]
    given: dict[str, Any] = {"x": random_like(shape, dtype, layout), "groups": groups}
    for name in PARAMETERS:
        size = (channels,) if name in ("weight", "bias") else (count, channels)
        offset = 1.0 if name == "weight" else 0.0
        given[name] = (offset + 0.5 * torch.randn(size)).to(dtype) if name in names else None
    return given


def exact(given: dict[str, Any], act: str = "silu", eps: float = 1e-5) -> Tensor:
    """The result in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    return formula(**wide, eps=eps, silu=act == "silu")


def allowed(given: dict[str, Any]) -> Tensor | float:
    """What float32 arithmetic may cost, in units of the parameters' sizes."""
    gain = 1.0
    if given["weight"] is not None:
        gain = gain * (1 + float(given["weight"].abs().max()))
    if given["scale"] is not None:
        gain = gain * (1 + float(given["scale"].abs().max()))
    return NORMALISED * gain


CASES = [
    *[(*case, dtype) for case, dtype in itertools.product(SHAPES, DTYPES)],
    *[(*case, dtype) for case, dtype in itertools.product(LARGE, DTYPES[:2])],
]
INTERPRETED = [
    *[(*case, torch.float32) for case in FEW_GROUPS],
    ((2, 12, 7, 9), 2, torch.bfloat16),
    ((2, 12, 8, 8), 2, torch.float16),
]
SM_80 = [((1, 3, 31, 33), 1, torch.float32)]
SM_90 = [((1, 12, 7, 9), 2, torch.bfloat16)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@across(
    "shape,groups,dtype",
    (COMPILED, CASES),
    (INTERPRETER, INTERPRETED),
    (SIMULATED[:1], SM_80),
    (SIMULATED[1:], SM_90),
)
def test_matches_float64_reference(
    backend: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: Layout
) -> None:
    given = arguments(shape, groups, dtype, layout)
    before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
    out = Poisoned(given["x"])
    assert group_norm_silu(**given, out=out.tensor, backend=backend) is out.tensor
    assert_within(out.check(), exact(given), allowed(given))
    for name, value in before.items():
        assert torch.equal(given[name], value), f"{name} was written"


@everywhere()
@pytest.mark.parametrize("act", ["silu", "none"])
@pytest.mark.parametrize(
    "names", [(), ("bias",), ("add",), ("scale", "shift"), ("weight", "scale")], ids="-".join
)
def test_optional_tensors(backend: str, names: tuple[str, ...], act: Any) -> None:
    given = arguments((2, 12, 7, 9), 2, torch.float32, names=names)
    result = group_norm_silu(**given, act=act, backend=backend)
    assert_within(result, exact(given, act), allowed(given))


@everywhere()
@pytest.mark.parametrize("act", ["silu", "none"])
def test_is_pytorchs_group_norm(backend: str, act: Any) -> None:
    """The truth the reference is held against: `F.group_norm` in float64, then `F.silu`."""
    given = arguments((2, 12, 7, 9), 2, torch.float32, names=("weight", "bias"))
    y = F.group_norm(given["x"].double(), 2, given["weight"].double(), given["bias"].double(), 0.1)
    y = F.silu(y) if act == "silu" else y
    assert_within(group_norm_silu(**given, eps=0.1, act=act, backend=backend), y, allowed(given))


@across(
    "shape,groups",
    (COMPILED, [((2, 32, 7, 9), 8), ((1, 64, 8, 8), 32)]),
    (MODES, [((1, 12, 7, 9), 2), ((1, 8, 33, 32), 2)]),
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_survive_a_large_mean(
    backend: str, shape: tuple[int, ...], groups: int, layout: Layout
) -> None:
    given = arguments(shape, groups, torch.float32, layout, names=())
    given["x"] += 1e4
    result = group_norm_silu(**given, act="none", backend=backend)
    assert_within(result, exact(given, "none"), LARGE_MEAN)


@everywhere()
def test_a_large_constant_group_stays_finite(backend: str) -> None:
    """Variance 0: eps alone, and no negative variance from cancellation."""
    x = torch.full((1, 8, 5, 5), 1234.5)
    result = group_norm_silu(x, None, None, 4, act="none", backend=backend)
    # the mean of equal numbers may be off by half a unit (6e-5), which rsqrt(eps) makes 0.02
    assert_within(result, torch.zeros_like(x), 6.2e-5 / 1e-5**0.5)


@everywhere()
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_in_place_equals_out_of_place(backend: str, layout: Layout) -> None:
    given = arguments((2, 12, 7, 9), 2, torch.float32, layout)
    apart = group_norm_silu(**given, backend=backend)
    result = group_norm_silu(**given, out=given["x"], backend=backend)
    assert result is given["x"]
    assert torch.equal(result, apart)


UNUSUAL: list[tuple[tuple[int, ...], Layout]] = [
    ((2, 8, 7, 9), "transposed"),
    ((2, 24, 17), "channels_last"),
    ((1, 8, 2, 3, 2, 3), "channels_last"),
]


@across("shape,layout", (MODES, UNUSUAL))
def test_unusual_layouts(backend: str, shape: tuple[int, ...], layout: Layout) -> None:
    given = arguments(shape, 2, torch.float32, layout)
    result = group_norm_silu(**given, backend=backend)
    assert result.stride() == given["x"].stride()
    assert_within(result, exact(given), allowed(given))


@everywhere()
def test_halves_of_a_projection(backend: str) -> None:
    """scale and shift as chunks of one [N, 2C] tensor, x a slice of a wider one, as U-Nets do."""
    given = arguments((2, 12, 7, 9), 2, torch.float32)
    given["scale"], given["shift"] = torch.randn(2, 24).chunk(2, dim=1)
    given["x"] = torch.randn(2, 24, 7, 9)[:, ::2]
    result = group_norm_silu(**given, backend=backend)
    assert_within(result, exact(given), allowed(given))


@everywhere()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_parameters_keep_their_dtype(backend: str, dtype: torch.dtype) -> None:
    """Autocast gives bfloat16 activations with float32 weights; both are read as they are."""
    given = arguments((2, 12, 7, 9), 2, torch.bfloat16)
    others = arguments((2, 12, 7, 9), 2, dtype)
    given |= {name: others[name] for name in ("weight", "bias", "add")}
    result = group_norm_silu(**given, backend=backend)
    assert result.dtype == torch.bfloat16
    assert_within(result, exact(given), allowed(given))


@everywhere()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_unaligned_memory(backend: str, dtype: torch.dtype) -> None:
    given = arguments((1, 12, 8, 8), 2, dtype)
    given["x"] = Poisoned(given["x"], offset=3).tensor.copy_(given["x"])
    out = Poisoned(given["x"], offset=5)
    group_norm_silu(**given, out=out.tensor, backend=backend)
    assert_within(out.check(), exact(given), allowed(given))


def gradients(given: dict[str, Any], dy: Tensor, act: Any, **options: Any) -> dict[str, Tensor]:
    """The gradient of every tensor of the call."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in given.items()
              if isinstance(v, Tensor)}  # fmt: skip
    y = group_norm_silu(**(given | leaves), act=act, **options)
    y.backward(dy.to(y.dtype))
    return {name: leaf.grad for name, leaf in leaves.items()}


def with_acts(cases: list[tuple[tuple[int, ...], int]]) -> list[Any]:
    """The cases in float32, with and without activation in turn."""
    acts = itertools.cycle(("silu", "none"))
    return [(*case, act, torch.float32) for case, act in zip(cases, acts, strict=False)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@across(
    "shape,groups,act,dtype",
    (COMPILED, with_acts([*SHAPES, ((2, 320, 32, 32), 32)])),
    (INTERPRETER, with_acts(FEW_GROUPS)),
    (MODES, [((2, 12, 7, 9), 2, "silu", dtype) for dtype in DTYPES]),
    (SIMULATED[1:], [((1, 12, 7, 9), 2, "silu", torch.float32)]),
)
def test_gradients(
    backend: str, shape: tuple[int, ...], groups: int, act: Any, dtype: torch.dtype, layout: Layout
) -> None:
    """Against autograd through the formula in float64, which knows nothing of our backward."""
    given = arguments(shape, groups, dtype, layout)
    dy = random_like(shape, dtype, layout)
    found = gradients(given, dy, act, backend=backend)
    leaves = {k: v.double().requires_grad_() for k, v in given.items() if isinstance(v, Tensor)}
    formula(**(given | leaves), eps=1e-5, silu=act == "silu").backward(dy.double())
    h = given["x"].double() + given["add"].double().view(*shape[:2], *[1] * (len(shape) - 2))
    rstd = (h.reshape(shape[0], groups, -1).var(-1, correction=0) + 1e-5).rsqrt().max()
    for name, leaf in leaves.items():
        assert found[name].dtype == given[name].dtype
        size = max(1.0, float(leaf.grad.abs().max()), float(rstd) if name in ("x", "add") else 0.0)
        assert_within(found[name], leaf.grad, GRADIENT * size, name)


@everywhere()
@pytest.mark.parametrize("wanted", PARAMETERS)
def test_only_the_gradients_asked_for(backend: str, wanted: str) -> None:
    given = arguments((1, 8, 3, 5), 2, torch.float32)
    everything = gradients(given, torch.ones(1, 8, 3, 5), "silu", backend=backend)
    leaf = given[wanted].clone().requires_grad_()
    group_norm_silu(**(given | {wanted: leaf}), backend=backend).sum().backward()
    assert torch.equal(leaf.grad, everything[wanted])


def test_gradients_of_the_formula() -> None:
    """First and second derivatives against finite differences, in float64."""
    given = arguments((2, 4, 3), 2, torch.float64)
    names = ["x", *PARAMETERS]

    def call(*tensors: Tensor) -> Tensor:
        return group_norm_silu(**(given | dict(zip(names, tensors, strict=True))))

    tensors = [given[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@across("shape", (("cpp",), [(3, 32, 31, 33), (4, 64, 64, 64)]), (MODES[1:], [(2, 12, 7, 9)]))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bitwise_repeatable(backend: str, shape: tuple[int, ...], layout: Layout) -> None:
    """Neither the run nor the number of threads changes a bit, forward or backward."""
    given = arguments(shape, 2, torch.float32, layout)
    dy = random_like(shape, torch.float32, layout)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        both = {"y": group_norm_silu(**given, backend=backend)}
        results.append(both | gradients(given, dy, "silu", backend=backend))
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    y = group_norm_silu(x, weight, None, 4)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(8))
