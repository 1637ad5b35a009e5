"""Operators of inverse problems: adjoint, pseudo-inverse and solve against dense algebra."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfuse import inverse

SIZES = [(1, 1, 1), (3, 1, 1), (1, 3, 5), (3, 3, 5), (2, 7, 7), (1, 12, 12)]
# (f64: a few operations of numbers around 1)
EXACT, PINV, SOLVED, FLOAT32 = 1e-12, 1e-10, 1e-8, 1e-5


class Physics:
    """Somebody else's operator: differences of neighbours, and nothing more than the two."""

    def A(self, x: Tensor) -> Tensor:
        return x - x.roll(1, -1) / 2

    def A_adjoint(self, y: Tensor) -> Tensor:
        return y - y.roll(-1, -1) / 2


def holes(size: tuple[int, ...]) -> Tensor:
    mask = torch.ones(size)
    mask.view(-1)[::3] = 0
    return mask


OPERATORS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "mask": lambda size: inverse.Mask(holes(size)),
    "one mask for all channels": lambda size: inverse.Mask(holes(size[1:])),
    "outpaint": lambda size: inverse.Outpaint((1, 0, 0, 2)),
    "downsample 1": lambda size: inverse.Downsample(1),
    "downsample 3": lambda size: inverse.Downsample(3),
    "downsample 4": lambda size: inverse.Downsample(4),
    "blur": lambda size: inverse.Blur(0.6),
    "wide blur": lambda size: inverse.Blur(2.0),
    "reflecting blur": lambda size: inverse.Blur(1.0, "reflect"),
    "radon": lambda size: inverse.Radon(5),
    "normalised radon": lambda size: inverse.Radon(3, normalize=True),
    "wide matrix": lambda size: inverse.Dense(matrix(3, size), size),
    "tall matrix": lambda size: inverse.Dense(matrix(500, size), size),
    "foreign": lambda size: inverse.Foreign(Physics(), iterations=40),
}


def matrix(rows: int, size: tuple[int, ...]) -> Tensor:
    columns = size[0] * size[1] * size[2]
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def fits(name: str, size: tuple[int, ...]) -> bool:
    _, height, width = size
    if "radon" in name:
        return height == width
    if "downsample" in name:
        return height % int(name[-1]) == 0 == width % int(name[-1])
    return name != "outpaint" or (height > 1 and width > 2)


CASES = [(name, size) for name in OPERATORS for size in SIZES if fits(name, size)]


def drawn(shape: Any, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(a: inverse.Operator, size: tuple[int, ...]) -> Tensor:
    """Its matrix, [measured, pixels], column by column."""
    count = size[0] * size[1] * size[2]
    return a(torch.eye(count, dtype=torch.float64).view(count, *size)).flatten(1).mT


def test_there_are_odd_sizes_for_every_operator() -> None:
    assert {name for name, _ in CASES} == {*OPERATORS}
    assert len(CASES) > 55


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, EXACT), (torch.float32, FLOAT32)])
@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_adjoint(name: str, size: tuple[int, ...], dtype: torch.dtype, near: float) -> None:
    a = OPERATORS[name](size)
    x = drawn((2, *size), dtype)
    y = a(x)
    u = drawn(y.shape, dtype, 1)
    left, right = (y * u).sum(), (x * a.adjoint(u)).sum()
    assert y.dtype == dtype
    assert a.adjoint(u).shape == x.shape
    assert abs(left - right) <= near * y.norm() * u.norm() + near * 1e-3


@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_pseudo_inverse_is_that_of_the_matrix(name: str, size: tuple[int, ...]) -> None:
    a = OPERATORS[name](size)
    x = drawn((2, *size), torch.float64)
    y = a(x)
    back = a.pinv(y)
    torch.testing.assert_close(a(back), y, rtol=PINV, atol=PINV)
    if "blur" not in name:  # whose own singular values are cut where rounding begins
        expected = torch.linalg.pinv(dense(a, size)) @ y.flatten(1).mT
        torch.testing.assert_close(back.flatten(1).mT, expected, rtol=SOLVED, atol=SOLVED)


@pytest.mark.parametrize(("r2", "noise"), [(0.7, 0.3), (0.0, 2.0), (3.0, 0.05)])
@pytest.mark.parametrize(("name", "size"), CASES)
def test_solve_is_the_inverse_of_the_matrix(
    name: str, size: tuple[int, ...], r2: float, noise: float
) -> None:
    a = OPERATORS[name](size)
    m = dense(a, size)
    r = drawn((2, *a(torch.zeros(1, *size)).shape[1:]), torch.float64)
    gram = r2 * m @ m.mT + noise**2 * torch.eye(len(m), dtype=torch.float64)
    expected = torch.linalg.solve(gram, r.flatten(1).mT).mT.view(r.shape)
    for given in (r2, torch.tensor(r2, dtype=torch.float64)):
        near = SOLVED * max(1.0, float(expected.abs().max()))  # 1 / noise^2 is large
        torch.testing.assert_close(a.solve(r, given, noise), expected, rtol=SOLVED, atol=near)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_solve_without_noise_leaves_out_what_is_not_measured(
    name: str, size: tuple[int, ...]
) -> None:
    """A^T (A A^T)^-1 y is A+ y, where singular values are 0 or of ordinary size."""
    if "blur" in name:
        return
    a = OPERATORS[name](size)
    y = a(drawn((2, *size), torch.float64))
    back = a.adjoint(a.solve(y, 1.0, 0.0))
    assert bool(torch.isfinite(back).all())
    torch.testing.assert_close(back, a.pinv(y), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", OPERATORS)
def test_samples_do_not_know_of_each_other(name: str) -> None:
    size = (1, 12, 12)
    a = OPERATORS[name](size)
    x = drawn((2, *size), torch.float64)
    y = a(x)
    for n in range(2):
        one = slice(n, n + 1)
        torch.testing.assert_close(a(x[one]), y[one], rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(
            a.solve(y[one], 0.5, 0.2), a.solve(y, 0.5, 0.2)[one], rtol=EXACT, atol=EXACT
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = drawn((2, 1, 12, 12), dtype)
    for name, make in OPERATORS.items():
        a = make((1, 12, 12))
        assert a(x).dtype == torch.float32, name
        torch.testing.assert_close(a(x), a(x.float()), rtol=0, atol=0)


def test_projections_have_the_sum_of_the_image() -> None:
    for side in (1, 2, 3, 5, 28, 64):
        x = drawn((2, 1, side, side), torch.float64)
        y = inverse.Radon(4)(x)
        sums = x.sum((2, 3))[..., None].expand(2, 1, 4)
        torch.testing.assert_close(y.sum(3), sums, rtol=1e-12, atol=1e-11)


def test_the_projection_of_a_disc() -> None:
    """2 sqrt(R^2 - s^2) at distance s from the centre, within 3 % inside."""
    side, radius, fine = 63, 25.0, 8
    at = (torch.arange(side * fine) + 0.5) / fine - side / 2
    inside = (at[:, None] ** 2 + at**2 <= radius**2).double()
    disc = inverse.Downsample(fine)(inside[None, None])
    y = inverse.Radon(7)(disc)[0, 0]
    s = torch.arange(y.shape[1]) - (y.shape[1] - 1) / 2
    inner = s.abs() < 0.8 * radius
    exact = 2 * (radius**2 - s[inner] ** 2).sqrt()
    assert float((y[:, inner] / exact - 1).abs().max()) < 0.03


def test_singular_values() -> None:
    size = (1, 12, 12)
    down = torch.linalg.svdvals(dense(inverse.Downsample(4), size))
    torch.testing.assert_close(down, torch.full((9,), 0.25, dtype=torch.float64))
    mask = torch.linalg.svdvals(dense(OPERATORS["mask"](size), size))
    assert mask.tolist() == pytest.approx([1.0] * 96 + [0.0] * 48)
    # a periodic blur has the Fourier transform of its kernel for eigenvalues
    kernel = inverse.Blur(0.9)(torch.eye(144, dtype=torch.float64)[:1].view(1, *size))
    blur = torch.linalg.svdvals(dense(inverse.Blur(0.9), size))
    fourier = torch.fft.fft2(kernel[0, 0]).abs().flatten().sort(descending=True).values
    torch.testing.assert_close(blur, fourier, rtol=EXACT, atol=EXACT)
    norm = torch.linalg.svdvals(dense(inverse.Radon(8, normalize=True), size))[0]
    assert float(norm) == pytest.approx(1)


@pytest.mark.parametrize("edge", ["periodic", "reflect"])
def test_a_blur_keeps_what_is_constant(edge: Any) -> None:
    x = torch.full((1, 2, 5, 9), 0.7, dtype=torch.float64)
    torch.testing.assert_close(inverse.Blur(3.0, edge)(x), x, rtol=EXACT, atol=EXACT)


def test_what_is_known_is_as_it_is() -> None:
    x = drawn((1, 1, 6, 8), torch.float64)
    assert torch.equal(inverse.Outpaint((1, 2, 3, 0))(x), x[..., 1:4, 3:])
    assert torch.equal(inverse.Outpaint(2)(x), x[..., 2:4, 2:6])
    assert torch.equal(inverse.Mask(torch.ones(1, 6, 8))(x), x)
    assert inverse.Downsample(2)(x)[0, 0, 0, 0] == pytest.approx(float(x[0, 0, :2, :2].mean()))


def test_copies_and_what_was_handed_over() -> None:
    mask = holes((1, 4, 4))
    a = inverse.Mask(mask)
    mask.fill_(1)
    x = drawn((1, 1, 4, 4), torch.float32)
    expected = a(x)
    assert float(expected.view(-1)[0]) == 0
    for other in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), a.bare()):
        assert torch.equal(other(x), expected)


def test_they_say_what_they_are() -> None:
    assert repr(inverse.Blur(2)) == "Blur(sigma=2.0, edge='periodic')"
    assert repr(inverse.Mask(torch.ones(1, 2, 2))) == "Mask(mask=tensor [1, 2, 2])"


def test_inference_mode_leaves_nothing_behind() -> None:
    a, x = inverse.Blur(1.0), drawn((1, 1, 4, 4), torch.float32)
    with torch.inference_mode():
        a(x)
        a.pinv(x)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(a(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, a.adjoint(torch.ones_like(x)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: inverse.Mask(torch.full((2, 2), 0.5)), "mask must hold 0 .missing. and 1"),
        (lambda: inverse.Mask(torch.ones(3, 3))(torch.ones(1, 1, 2, 2)), "mask must be broadc"),
        (lambda: inverse.Downsample(0), "factor must be at least 1; got 0"),
        (lambda: inverse.Downsample(3)(torch.ones(1, 1, 4, 6)), "factor must divide 4 and 6"),
        (lambda: inverse.Outpaint(0), "pad must be a size of at least 1"),
        (lambda: inverse.Outpaint(2)(torch.ones(1, 1, 4, 9)), "leaves nothing of images of 4x9"),
        (lambda: inverse.Blur(0), r"sigma must be in \(0, 256\] pixels; got 0"),
        (lambda: inverse.Blur(1.0, "zero"), "edge must be.*'zero'"),
        (lambda: inverse.Radon(0), "angles must be in 1 .. 360; got 0"),
        (lambda: inverse.Radon(2)(torch.ones(1, 1, 3, 4)), "must be square.*got x of 3x4"),
        (lambda: inverse.Radon(2)(torch.ones(1, 1, 65, 65)), "at most 64.*got x of 65x65"),
        (lambda: inverse.Radon(2).adjoint(torch.ones(1, 1, 2, 5)), "with as many bins as"),
        (lambda: inverse.Dense(torch.full((2, 2), float("nan"))), "matrix must be finite"),
        (lambda: inverse.Dense(torch.ones(2, 4), (3,)), r"shape must have 4 elements"),
        (lambda: inverse.Dense(torch.ones(2, 4))(torch.ones(1, 3)), r"x must be \[N, 4\]"),
        (lambda: inverse.Dense(torch.ones(2, 4)).pinv(torch.ones(1, 3)), r"y must be \[N, 2\]"),
        (lambda: inverse.Foreign(Physics(), 0), "iterations must be at least 1; got 0"),
        (lambda: inverse.Blur(1.0).solve(torch.ones(1, 1, 2, 2), -1.0, 0.1), "r2 must be 0 or"),
        (lambda: inverse.Blur(1.0).solve(torch.ones(1, 1, 2, 2), 1.0, -0.1), "noise must be 0"),
        (lambda: inverse.Blur(1.0)(torch.ones(2, 2)), r"x must be \[N, C, H, W\]"),
    ],
)
def test_mistakes_are_named(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_an_object_without_an_adjoint_is_named() -> None:
    class Half:
        def A(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TypeError, match="got Half, which has no A_adjoint"):
        inverse.Foreign(Half())
    with pytest.raises(TypeError, match="which has no A and no A_adjoint"):
        inverse.Foreign(object())
    with pytest.raises(TypeError, match="the class"):
        inverse.Foreign(Physics)
