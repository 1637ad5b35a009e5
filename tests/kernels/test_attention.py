"""Attention against its reference in float64, at any width and number of positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    PRODUCT_DTYPES,
    Poisoned,
    assert_within,
    distance,
    in_threads,
    needs_bfloat16,
    needs_module,
    negated,
)
from torch import Tensor

from stepfuse.kernels.attention import OP, attention
from stepfuse.kernels.reference import attention as reference

# relative L2. float32: sums in another order; bfloat16: weights and results of 8 bits
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
DOUBLE = 1e-14  # of a few hundred terms in float64
dtypes = pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
SHAPES = [  # samples, heads, queries, keys, width, width of the values
    (1, 1, 1, 1, 2, 1),
    (1, 1, 256, 256, 256, 256),
    (2, 3, 17, 40, 8, 8),
    (1, 2, 5, 77, 64, 96),
    (2, 8, 33, 64, 40, 40),
    (3, 1, 16, 16, 512, 512),
]


def heads(n: int, count: int, positions: int, width: int, dtype: torch.dtype) -> Tensor:
    """[N, heads, positions, width] as a network has them: tokens [N, L, heads width], seen so."""
    return torch.randn(n, positions, count, width).to(dtype).transpose(1, 2)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, count, queries, keys, width, values = shape
    sizes = ((queries, width), (keys, width), (keys, values))
    q, k, v = (heads(n, count, *size, dtype) for size in sizes)
    return q, k, v


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return reference.formula(q.double(), k.double(), v.double(), scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_pytorchs(shape: tuple[int, ...]) -> None:
    q, k, v = operands(shape, torch.float64)
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert distance(reference.formula(q, k, v, 0.3), exact) < DOUBLE


@needs_module
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_it_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = operands(shape, dtype)
    found = attention(q, k, v, 0.3)
    assert found.dtype is dtype
    assert found.transpose(1, 2).is_contiguous()
    assert distance(found, oracle(q, k, v, 0.3)) < TOLERANCE[dtype]
    # whatever lies between the positions, the order of dimensions, and the number of threads
    apart = [torch.cat([x, x * torch.nan], -1)[..., : x.shape[-1]] for x in (q, k, v)]
    assert torch.equal(attention(*apart, 0.3), found)
    for threads in (1, 2, 3):
        with in_threads(threads):
            again = attention(q.contiguous(), k.mT.contiguous().mT, v, 0.3)
        assert torch.equal(again, found)


@pytest.mark.parametrize("dtype", [*PRODUCT_DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_result_may_have_its_place(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All of it is written, and nothing around it; a place of another shape is left alone."""
    q, k, v = operands(shape, dtype)
    expected = attention(q, k, v, 0.3)
    out = Poisoned(expected)
    assert attention(q, k, v, 0.3, out=out.tensor) is out.tensor
    assert torch.equal(out.check(), expected)
    other = torch.full((1, 2, 3, 4), 7.0, dtype=dtype)
    assert torch.equal(attention(q, k, v, 0.3, out=other), expected)
    assert (other == 7).all()


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float64, 8), (torch.float16, 8), (torch.bfloat16, 7)]
)
def test_the_reference_does_what_the_module_cannot(dtype: torch.dtype, width: int) -> None:
    q, k, v = operands((1, 2, 3, 5, width, 6), dtype)
    found = attention(q, k, v, 0.5)
    assert found.transpose(1, 2).is_contiguous()
    # float32 arithmetic on a dozen terms, and a rounding of the result
    assert_within(found, oracle(q, k, v, 0.5), 1e-6)


@needs_module
@dtypes
@torch.no_grad()
def test_large_and_infinite_logits(dtype: torch.dtype) -> None:
    q, k, v = operands((1, 1, 9, 9, 32, 32), dtype)
    # weights of 0 and 1, but for near ties: the logits are 1e4 and their last bit is 1e-3
    exact = oracle(100 * q, 100 * k, v, 32**-0.5)
    assert distance(attention(100 * q, 100 * k, v, 32**-0.5), exact) < 1e-2
    k[0, 0, 4] = torch.nan
    assert attention(q, k, v, 1.0).isnan().all()
    q[0, 0, 2] = torch.nan
    assert attention(q, k[:, :, :4], v[:, :, :4], 1.0)[0, 0].isnan().all(-1).tolist() == [
        position == 2 for position in range(9)
    ]


@pytest.mark.parametrize("call", [OP, attention])
def test_a_pending_negation(call: object) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    assert callable(call)
    assert torch.equal(call(*map(negated, (q, k, v)), 0.3), attention(q, k, v, 0.3))


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    for call in (OP, attention):
        with pytest.raises(ValueError, match="one dtype"):
            call(q, q.to(torch.bfloat16), q, 1.0)
        with pytest.raises(ValueError, match=r"do not fit; got \[1, 2, 3, 8\], \[1, 2, 3, 6\]"):
            call(q, q[..., :6], q, 1.0)
        for scale in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="scale must be positive"):
                call(q, q, q, scale)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)
def test_the_operator_has_shapes_without_data(dtype: torch.dtype) -> None:
    q = torch.randn(1, 2, 3, 8).to(dtype)
    torch.library.opcheck(OP, (q, q, torch.randn(1, 2, 3, 5).to(dtype), 0.5))
