"""add_noise on every backend against the closed form in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_cases import (
    COMPILED,
    INTERPRETER,
    MODES,
    NORMAL,
    SIMULATED,
    Layout,
    Poisoned,
    across,
    assert_within,
    everywhere,
    random_like,
)
from torch import Tensor

from stepfuse.kernels import philox
from stepfuse.kernels.add_noise import Target, add_noise

# x_t and v are two float32 products and a sum of coefficients rounded once: five roundings, bounded
# by the absolute values of the terms.
ARITHMETIC = 5 * 2.0**-24

SHAPES = [(1, 1), (2, 3, 7, 9), (1, 4, 31, 33), (3, 4, 8, 8), (2, 5), (4,), (1, 2, 3, 5, 7)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS: tuple[Target | None, ...] = (None, "epsilon", "v_prediction")
TIMESTEPS = 1000
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64), 0)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, drawn: bool, layout: Layout = "contiguous"
) -> dict[str, Any]:
    """Keyword arguments of one call, with a timestep for each sample."""
    given: dict[str, Any] = {"x0": random_like(shape, dtype, layout), "alphas_cumprod": ABAR}
    given["t"] = torch.randint(0, TIMESTEPS, shape[:1])
    given["t"][-1], given["t"][0] = TIMESTEPS - 1, 0  # where 1 - abar, or abar, is smallest
    given["noise"] = None if drawn else random_like(shape, dtype, layout)
    if drawn:
        given["seed"] = torch.randint(-(2**63), 2**63 - 1, shape[:1])
        given["sample"] = torch.randint(-(2**63), 2**63 - 1, shape[:1])
    return given


def check(given: dict[str, Any], x_t: Tensor, target: str | None, found: Tensor | None) -> None:
    """x_t and the target are within the roundings of the closed form, and of drawn noise."""
    x0, t = given["x0"].double(), given["t"]
    eps, drawn = given["noise"], 0.0
    if eps is None:
        eps, drawn = exact_noise(given), NORMAL
    eps = eps.double()
    abar = ABAR[t].view(-1, *[1] * (x0.dim() - 1))
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()
    allowed = ARITHMETIC * (signal * x0.abs() + sigma * eps.abs()) + sigma * drawn
    assert_within(x_t, signal * x0 + sigma * eps, allowed, "x_t")
    if target == "epsilon":
        assert_within(found, eps, drawn, "epsilon")
    elif target == "v_prediction":
        allowed = ARITHMETIC * (signal * eps.abs() + sigma * x0.abs()) + signal * drawn
        assert_within(found, signal * eps - sigma * x0, allowed, "v")


def exact_noise(given: dict[str, Any]) -> Tensor:
    """The float64 definition of the noise that is drawn inside."""
    shape = given["x0"].shape[1:]
    return philox.normal(
        given["seed"], given["sample"], given["t"], shape, "reference", dtype=torch.float64
    )


CASES = [
    *itertools.product(SHAPES, DTYPES[:2], (False, True), TARGETS[2:]),
    *itertools.product([(2, 3, 7, 9), (3, 4, 8, 8)], DTYPES, (False, True), TARGETS),
]
INTERPRETED = [
    *itertools.product(SHAPES, DTYPES[:1], (True,), TARGETS[2:]),
    *itertools.product([(3, 4, 8, 8)], DTYPES, (False, True), TARGETS[1:]),
]
SM_80 = [((2, 3, 7, 9), torch.float32, True, "v_prediction")]
SM_90 = [((3, 4, 8, 8), torch.bfloat16, True, "epsilon")]


@across(
    "shape,dtype,drawn,target",
    (COMPILED, CASES),
    (INTERPRETER, INTERPRETED),
    (SIMULATED[:1], SM_80),
    (SIMULATED[1:], SM_90),
)
def test_matches_the_closed_form(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, drawn: bool, target: Target | None
) -> None:
    given = arguments(shape, dtype, drawn)
    before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
    out, goal = Poisoned(given["x0"]), Poisoned(given["x0"])
    target_out = None if target is None else goal.tensor
    add_noise(**given, target=target, out=out.tensor, target_out=target_out, backend=backend)
    check(given, out.check(), target, None if target is None else goal.check())
    for name, value in before.items():
        assert torch.equal(given[name], value), f"{name} was written"


LAYOUTS: list[tuple[tuple[int, ...], Layout]] = [
    ((2, 3, 7, 9), "channels_last"),
    ((1, 2, 3, 5, 7), "channels_last"),
    ((2, 3, 7, 9), "transposed"),
]


@across("shape,layout", (MODES, LAYOUTS))
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_layouts(backend: str, shape: tuple[int, ...], layout: Layout, drawn: bool) -> None:
    """The noise of an element follows its C-order index, wherever it lies in memory."""
    given = arguments(shape, torch.float32, drawn, layout)
    x_t, v = add_noise(**given, target="v_prediction", backend=backend)
    assert x_t.stride() == given["x0"].stride()
    check(given, x_t, "v_prediction", v)


@everywhere()
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_unaligned_memory(backend: str, dtype: torch.dtype) -> None:
    given = arguments((3, 4, 8, 8), dtype, drawn=True)
    given["x0"] = Poisoned(given["x0"], offset=3).tensor.copy_(given["x0"])
    out = Poisoned(given["x0"], offset=5)
    add_noise(**given, out=out.tensor, backend=backend)
    check(given, out.check(), None, None)


@everywhere()
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_in_place_equals_out_of_place(backend: str, drawn: bool, target: Target | None) -> None:
    given = arguments((2, 3, 7, 9), torch.float32, drawn)
    apart = add_noise(**given, target=target, backend=backend)
    over = dict(given, x0=given["x0"].clone())
    within = add_noise(**over, target=target, inplace=True, backend=backend)
    if target is not None:
        assert torch.equal(within[1], apart[1])
        apart, within = apart[0], within[0]
    assert within is over["x0"]
    assert torch.equal(within, apart)


@across("shape", (("cpp",), [(3, 3, 31, 33), (8, 3, 64, 64)]), (MODES[1:], [(3, 4, 8, 8)]))
def test_bitwise_repeatable(backend: str, shape: tuple[int, ...]) -> None:
    """Neither the run nor the number of threads changes a bit."""
    given = arguments(shape, torch.float32, drawn=True)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(add_noise(**given, target="v_prediction", backend=backend))
    for x_t, v in results[1:]:
        assert torch.equal(x_t, results[0][0])
        assert torch.equal(v, results[0][1])


@everywhere()
def test_drawn_noise_is_that_of_philox(backend: str) -> None:
    """Whatever the batch: a sample noised alone is the sample noised among others."""
    given = arguments((3, 3, 7, 9), torch.float32, drawn=True)
    x_t, eps = add_noise(**given, target="epsilon", backend=backend)
    same = philox.normal(given["seed"], given["sample"], given["t"], (3, 7, 9), backend)
    assert torch.equal(eps, same)
    explicit = {k: v for k, v in given.items() if k not in ("seed", "sample")}
    assert_within(add_noise(**dict(explicit, noise=eps), backend=backend), x_t, 8 * ARITHMETIC)
    alone = {k: v if k == "alphas_cumprod" else v[1:2] for k, v in given.items() if v is not None}
    assert torch.equal(add_noise(**alone, noise=None, backend=backend), x_t[1:2])


@everywhere()
def test_one_timestep_for_all(backend: str) -> None:
    given = arguments((2, 3, 4, 4), torch.float32, drawn=True)
    shared = add_noise(**dict(given, t=600), backend=backend)
    each = add_noise(**dict(given, t=torch.tensor([600, 600])), backend=backend)
    one = add_noise(**dict(given, t=torch.tensor([600])), backend=backend)
    assert torch.equal(shared, each)
    assert torch.equal(shared, one)


@everywhere()
def test_float32_schedule_is_taken_as_it_is(backend: str) -> None:
    """1 - abar of a float32 table is computed in float64: no digits are lost beyond its own."""
    given = arguments((2, 3, 4, 4), torch.float32, drawn=False)
    table = ABAR.float()
    a = add_noise(**dict(given, alphas_cumprod=table), backend=backend)
    b = add_noise(**dict(given, alphas_cumprod=table.double()), backend=backend)
    assert torch.equal(a, b)


@everywhere()
def test_mixed_dtypes_follow_x0(backend: str) -> None:
    given = arguments((2, 3, 4, 4), torch.bfloat16, drawn=False)
    wide = dict(given, noise=given["noise"].double())
    x_t = add_noise(**wide, backend=backend)
    assert x_t.dtype == torch.bfloat16
    assert torch.equal(x_t, add_noise(**given, backend=backend))


def test_float64_keeps_its_digits() -> None:
    given = arguments((2, 3, 4, 4), torch.float64, drawn=True)
    x_t, v = add_noise(**given, target="v_prediction")
    eps, abar = exact_noise(given), ABAR[given["t"]].view(-1, 1, 1, 1)
    x0 = given["x0"]
    torch.testing.assert_close(
        x_t, abar.sqrt() * x0 + (1 - abar).sqrt() * eps, rtol=1e-14, atol=1e-14
    )
    torch.testing.assert_close(
        v, abar.sqrt() * eps - (1 - abar).sqrt() * x0, rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_gradients_of_the_formula(target: Target | None, drawn: bool) -> None:
    """First and second derivatives against finite differences, in float64."""
    given = arguments((2, 3, 2), torch.float64, drawn)
    names = ["x0"] if drawn else ["x0", "noise"]

    def call(*tensors: Tensor) -> Any:
        return add_noise(**dict(given, **dict(zip(names, tensors, strict=True))), target=target)

    tensors = [given[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@everywhere()
def test_gradients_in_float32(backend: str) -> None:
    given = arguments((2, 3, 7, 9), torch.float32, drawn=False)
    weight = torch.randn(2, *given["x0"].shape)

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = {k: given[k].detach().to(dtype).requires_grad_() for k in ("x0", "noise")}
        x_t, v = add_noise(**dict(given, **leaves), target="v_prediction", backend=backend)
        (x_t * weight[0] + v * weight[1]).sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    expected = gradients(torch.float64, "reference")
    for a, b in zip(gradients(torch.float32, backend), expected, strict=True):
        assert_within(a, b, ARITHMETIC * float(weight.abs().max()) * 2)


def test_in_place_records_no_gradient() -> None:
    given = arguments((2, 3), torch.float32, drawn=False)
    given["x0"].requires_grad_()
    with pytest.raises(ValueError, match="no_grad"):
        add_noise(**given, inplace=True)
