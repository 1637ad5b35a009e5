"""The attention operator against PyTorch's in float64, at any width and number of positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.networks import distance
from torch import Tensor

from stepfuse.kernels.attend import attend
from stepfuse.kernels.convolve import native, why_not

# float32: sums in another order; bfloat16: weights and results of 8 bits
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.skipif(native is None, reason="needs the C++ module (a C++ compiler)")
dtypes = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                bool(why_not(torch.bfloat16)), reason="needs AVX512-BF16 (CPU)"
            ),
        ),
    ],
)
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


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_it_is_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, count, queries, keys, width, values = shape
    q, k = heads(n, count, queries, width, dtype), heads(n, count, keys, width, dtype)
    v = heads(n, count, keys, values, dtype)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    found = attend(q, k, v, 0.3)
    assert found.dtype is dtype
    assert found.transpose(1, 2).is_contiguous()
    assert distance(found, exact) < TOLERANCE[dtype]
    # whatever lies between the positions, the order of dimensions, and the number of threads
    apart = [torch.cat([x, x * torch.nan], -1)[..., : x.shape[-1]] for x in (q, k, v)]
    assert torch.equal(attend(*apart, 0.3), found)
    threads = torch.get_num_threads()
    for other in (1, 2, 3):
        torch.set_num_threads(other)
        try:
            again = attend(q.contiguous(), k.mT.contiguous().mT, v, 0.3)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again, found)


@dtypes
@torch.no_grad()
def test_large_and_infinite_logits(dtype: torch.dtype) -> None:
    q, k, v = (heads(1, 1, 9, 32, dtype) for _ in range(3))
    exact = F.scaled_dot_product_attention(100 * q.double(), 100 * k.double(), v.double())
    found = attend(100 * q, 100 * k, v, 32**-0.5)
    # weights of 0 and 1, but for near ties: the logits are 1e4 and their last bit is 1e-3
    assert distance(found, exact) < 1e-2
    k[0, 0, 4] = torch.nan
    assert attend(q, k, v, 1.0).isnan().all()
    q[0, 0, 2] = torch.nan
    assert attend(q, k[:, :, :4], v[:, :, :4], 1.0)[0, 0].isnan().all(-1).tolist() == [
        position == 2 for position in range(9)
    ]


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_fakes_have_shapes() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="one dtype"):
        attend(q, q.to(torch.bfloat16), q, 1.0)
    with pytest.raises(ValueError, match=r"do not fit; got \[1, 2, 3, 8\], \[1, 2, 3, 6\]"):
        attend(q, q[..., :6], q, 1.0)
    with pytest.raises(ValueError, match="cannot run here: not for"):
        attend(q.double(), q.double(), q.double(), 1.0)
    if not why_not(torch.bfloat16):
        odd = q[..., :7].to(torch.bfloat16)
        with pytest.raises(ValueError, match="an even width; got 7"):
            attend(odd, odd, odd, 1.0)
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="scale must be positive"):
            attend(q, q, q, scale)
    torch.library.opcheck(attend, (q, q, torch.randn(1, 2, 3, 5), 0.5))
