"""denoise_step on every backend: against the float64 reference, and against the equations."""

from __future__ import annotations

import itertools

import pytest
import torch
from denoise_cases import HEAVY, VARIANTS, Variant, arguments, check
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
    placed,
)
from torch import Tensor

from stepfuse.bench.gpu_check.denoise_cases import ARITHMETIC, exact
from stepfuse.kernels import philox
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.step_row import COLUMNS, Column

SHAPES = [(1, 3, 1, 1), (1, 4, 31, 33), (2, 4, 8, 8), (3, 2), (2, 3, 17), (1, 2, 3, 5, 7)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CASES = [
    *itertools.product([(2, 3, 7, 9), (2, 4, 8, 8)], VARIANTS, DTYPES),
    *itertools.product(SHAPES, [HEAVY], DTYPES[:2]),
]
INTERPRETED = [
    *itertools.product([(2, 3, 7, 9)], VARIANTS, DTYPES[:1]),
    *itertools.product([(2, 4, 8, 8)], VARIANTS[-2:], DTYPES),
    *itertools.product(SHAPES, [HEAVY], DTYPES[:1]),
]
SM_80 = [((2, 3, 7, 9), VARIANTS[-2], torch.float32), ((3, 2), VARIANTS[3], torch.float16)]
SM_90 = [((2, 4, 8, 8), VARIANTS[-1], torch.bfloat16)]


@across(
    "shape,variant,dtype",
    (COMPILED, CASES),
    (INTERPRETER, INTERPRETED),
    (SIMULATED[:1], SM_80),
    (SIMULATED[1:], SM_90),
)
def test_matches_float64_reference(
    backend: str, shape: tuple[int, ...], variant: Variant, dtype: torch.dtype
) -> None:
    given = arguments(variant, shape, dtype)
    given["return_x0"] = variant.x0
    before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
    out = Poisoned(given["x"])
    if variant.x0:
        x0_out = Poisoned(given["x"])
        denoise_step(**given, out=out.tensor, x0_out=x0_out.tensor, backend=backend)
        check(given, out.check(), x0_out.check())
    else:
        result = denoise_step(**given, out=out.tensor, backend=backend)
        assert result is out.tensor
        check(given, out.check(), None)
    for name, value in before.items():
        assert torch.equal(given[name], value), f"{name} was written"


LAYOUTS: list[tuple[tuple[int, ...], Layout]] = [
    ((2, 3, 7, 9), "channels_last"),
    ((1, 2, 3, 5, 7), "channels_last"),
    ((2, 3, 7, 9), "transposed"),
    ((2, 3, 17), "channels_last"),
]


@across("shape,layout", (MODES, LAYOUTS))
@pytest.mark.parametrize("variant", [VARIANTS[0], HEAVY, VARIANTS[-1]], ids=str)
def test_layouts(backend: str, shape: tuple[int, ...], layout: Layout, variant: Variant) -> None:
    """The noise of an element follows its C-order index, wherever it lies in memory."""
    given = arguments(variant, shape, torch.float32, layout)
    x_s, x0 = denoise_step(**given, backend=backend)
    assert x_s.stride() == given["x"].stride()
    check(given, x_s, x0)


@everywhere()
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[7], VARIANTS[5]], ids=str)
@pytest.mark.parametrize("output_dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_half_precision_model(backend: str, variant: Variant, output_dtype: torch.dtype) -> None:
    """A float32 trajectory with a 16-bit, channels-last network is computed in float32."""
    given = arguments(variant, (2, 3, 7, 9), torch.float32, output_dtype=output_dtype)
    given["model_output"] = placed(given["model_output"], "channels_last")
    check(given, *denoise_step(**given, backend=backend))


@everywhere()
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_unaligned_memory(backend: str, dtype: torch.dtype) -> None:
    given = arguments(HEAVY, (2, 4, 8, 8), dtype)
    given["x"] = Poisoned(given["x"], offset=3).tensor.copy_(given["x"])
    out = Poisoned(given["x"], offset=5)
    denoise_step(**given, out=out.tensor, backend=backend)
    check(given, out.check(), None)


@everywhere()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_in_place_equals_out_of_place(backend: str, variant: Variant) -> None:
    given = arguments(variant, (2, 3, 7, 9), torch.float32)
    x_s, x0 = denoise_step(**given, backend=backend)
    over = dict(given, x=given["x"].clone())
    result, x0_over = denoise_step(**over, inplace=True, backend=backend)
    assert result is over["x"]
    assert torch.equal(result, x_s)
    assert torch.equal(x0_over, x0)


@across("shape", (("cpp",), [(3, 3, 31, 33), (8, 3, 64, 64)]), (MODES[1:], [(2, 4, 8, 8)]))
def test_bitwise_repeatable(backend: str, shape: tuple[int, ...]) -> None:
    """Neither the run nor the number of threads changes a bit."""
    given = arguments(HEAVY, shape, torch.float32)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(denoise_step(**given, backend=backend))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@everywhere()
def test_noise_depends_on_seed_sample_timestep_and_element_only(backend: str) -> None:
    """Drawing inside equals the noise of `philox.normal`; a sample does not see its batch."""
    given = arguments(Variant("drawn", noise="drawn"), (3, 3, 7, 9), torch.float32)
    x_s, _ = denoise_step(**given, backend=backend)
    single = dict(given)
    for name in ("x", "model_output", "seed", "sample"):
        single[name] = given[name][1:2].clone()
    assert torch.equal(denoise_step(**single, backend=backend)[0], x_s[1:2])
    noise = philox.normal(
        given["seed"], given["sample"], int(given["table"][3, Column.TIMESTEP]), (3, 7, 9), backend
    )
    explicit = {k: v for k, v in given.items() if k not in ("seed", "sample")}
    same, _ = denoise_step(**explicit, noise=noise, backend=backend)
    sigma = float(given["table"][3, Column.SIGMA])
    # two float32 results of one formula, whose noise may differ in its last bits
    torch.testing.assert_close(same, x_s, rtol=0, atol=NORMAL * sigma + ARITHMETIC * 20)


@everywhere()
def test_zero_sigma_is_independent_of_the_seed(backend: str) -> None:
    """One captured step serves eta = 0 too: bitwise the result without noise."""
    given = arguments(Variant("drawn", noise="drawn"), (2, 3, 7, 9), torch.float32)
    given["table"][3, Column.SIGMA] = 0
    x_s, _ = denoise_step(**given, backend=backend)
    without = {k: v for k, v in given.items() if k not in ("seed", "sample")}
    assert torch.equal(denoise_step(**without, backend=backend)[0], x_s)


@everywhere()
def test_seeds_are_64_bit_patterns(backend: str) -> None:
    given = arguments(VARIANTS[0], (2, 3, 2, 2), torch.float32)
    for pattern, signed in ((2**64 - 1, -1), (2**63 + 5, 5 - 2**63)):
        a = denoise_step(**given, seed=pattern, sample=pattern, backend=backend)[0]
        b = denoise_step(**given, seed=signed, sample=signed, backend=backend)[0]
        assert torch.equal(a, b)
    a = denoise_step(**given, seed=7, sample=40, backend=backend)[0]
    numbers = torch.tensor([40, 41])
    assert torch.equal(a, denoise_step(**given, seed=7, sample=numbers, backend=backend)[0])


@everywhere()
def test_clipping_lets_nan_through(backend: str) -> None:
    given = arguments(VARIANTS[1], (1, 3, 4, 4), torch.float32)
    given["x"][0, 1, 2, 3] = torch.nan
    x_s, x0 = denoise_step(**given, backend=backend)
    assert x_s.isnan().sum() == 1
    assert x0.isnan().sum() == 1
    assert x0[0, 1, 2, 3].isnan()


@everywhere()
def test_no_clipping_with_an_infinite_bound(backend: str) -> None:
    given = arguments(VARIANTS[1], (1, 3, 4, 4), torch.float32)
    given["table"][3, Column.CLIP] = torch.inf
    row = given["table"][3].double()
    expected = row[Column.P_X] * given["x"] + row[Column.P_O] * given["model_output"]
    _, x0 = denoise_step(**given, backend=backend)
    check(given, *denoise_step(**given, backend=backend))
    assert_within(x0, expected, ARITHMETIC * 20, "x0")


def posterior_mean(a: float, b: float) -> tuple[float, float]:
    """The coefficients of x0 and x_t in the mean of q(x_s | x_t, x0): DDPM eq. 7."""
    alpha = a / b
    return b**0.5 * (1 - alpha) / (1 - a), alpha**0.5 * (1 - b) / (1 - a)


def ddim_row(prediction: str, a: float, b: float, sigma: float) -> Tensor:
    """A row for going from abar_t = a to abar_s = b: DDIM eq. 12 in the table's terms."""
    row = torch.zeros(COLUMNS, dtype=torch.float64)
    alpha, beta = a**0.5, (1 - a) ** 0.5
    p_x, p_o = {
        "epsilon": (1 / alpha, -beta / alpha),
        "sample": (0.0, 1.0),
        "v_prediction": (alpha, -beta),
        "mean": (-posterior_mean(a, b)[1] / posterior_mean(a, b)[0], 1 / posterior_mean(a, b)[0]),
    }[prediction]
    direction = (1 - b - sigma**2) ** 0.5
    # eps = (x - sqrt(a) x0) / sqrt(1 - a), re-derived after clipping
    row[Column.P_X], row[Column.P_O] = p_x, p_o
    row[Column.C_X], row[Column.C_0] = direction / beta, b**0.5 - direction * alpha / beta
    row[Column.SIGMA], row[Column.CLIP] = sigma, 1.0
    return row[None]


@everywhere()
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "mean"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_is_ddim_equation_12(backend: str, prediction: str, eta: float) -> None:
    a, b = 0.4, 0.7
    sigma = eta * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
    x0, eps, z = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    x0 = x0.clamp(-1, 1)
    x = a**0.5 * x0 + (1 - a) ** 0.5 * eps
    output = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x0,
        "mean": posterior_mean(a, b)[0] * x0 + posterior_mean(a, b)[1] * x,
    }[prediction]
    expected = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps + sigma * z
    table = ddim_row(prediction, a, b, sigma)
    x_s, x0_found = denoise_step(
        x.float(),
        output.float(),
        table.float(),
        0,
        noise=z.float(),
        return_x0=True,
        backend=backend,
    )
    # inputs rounded to float32, then a handful of terms below 10 in size
    assert_within(x_s, expected, 2 * ARITHMETIC * 10, "x_s")
    assert_within(x0_found, x0, 2 * ARITHMETIC * 10, "x0")


def test_float64_keeps_its_digits() -> None:
    given = arguments(HEAVY, (2, 3, 5, 5), torch.float64)
    given["table"] = given["table"].double() / 3
    given["table"][:, Column.TIMESTEP] = 7
    x_s, x0 = denoise_step(**given)
    expected, expected_x0, _, _ = exact(given)
    assert x_s.dtype == torch.float64
    torch.testing.assert_close(x_s, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(x0, expected_x0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_of_the_formula(variant: Variant) -> None:
    """First and second derivatives against finite differences, in float64."""
    given = arguments(variant, (1, 2, 2, 2), torch.float64)
    given["table"] = given["table"].double()
    names = [k for k in ("x", "model_output", "uncond_output", "noise") if k in given]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return denoise_step(**dict(given, **dict(zip(names, tensors, strict=True))))

    tensors = [given[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@everywhere()
def test_gradients_in_float32(backend: str) -> None:
    """The gradient through a fast forward is that of the float64 formula."""
    given = arguments(HEAVY, (2, 3, 7, 9), torch.float32)
    names = ("x", "model_output", "uncond_output")
    weight = torch.randn_like(given["x"])

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = {k: given[k].detach().to(dtype).requires_grad_() for k in names}
        x_s, x0 = denoise_step(**{**given, **leaves}, backend=backend)
        ((x_s + 2 * x0) * weight).sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    found, expected = gradients(torch.float32, backend), gradients(torch.float64, "reference")
    for name, a, b in zip(names, found, expected, strict=True):
        # NORMAL enters through the drawn noise of the variance's gradient
        torch.testing.assert_close(
            a.double(), b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@everywhere(COMPILED)
@pytest.mark.parametrize("step", [-1, 5, 2**40])
def test_a_row_outside_the_table_is_refused_on_the_cpu(backend: str, step: int) -> None:
    given = arguments(VARIANTS[0], (2, 3, 4, 4), torch.float32) | {"step": torch.tensor([step])}
    with pytest.raises(IndexError):
        denoise_step(**given, backend=backend)


def test_writing_into_a_buffer_records_no_gradient() -> None:
    given = arguments(VARIANTS[0], (2, 3, 4, 4), torch.float32)
    given["x"].requires_grad_()
    with pytest.raises(ValueError, match="no_grad"):
        denoise_step(**given, out=torch.zeros(2, 3, 4, 4))
    with torch.no_grad():
        out = torch.full((2, 3, 4, 4), torch.nan)
        denoise_step(**given, out=out)
    check(given, out, None)


def test_the_table_is_a_constant() -> None:
    given = arguments(VARIANTS[0], (2, 3, 4, 4), torch.float32)
    given["x"].requires_grad_()
    given["table"].requires_grad_()
    x_s, _ = denoise_step(**given)
    with pytest.raises(ValueError, match="detach"):
        x_s.sum().backward()
