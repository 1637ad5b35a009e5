"""Concatenation that keeps images channels-last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import optimize
from stepfuse.kernels.concatenate import join
from stepfuse.kernels.convolve import native

pytestmark = pytest.mark.skipif(native is None, reason="needs the C++ module (a C++ compiler)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (1, 64, 64)])
def test_it_is_cat(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, h, w = shape
    images = [torch.randn(n, c, h, w).to(dtype) for c in (7, 1, 32)]
    exact = torch.cat(images, 1)
    for given in (images, [i.contiguous(memory_format=torch.channels_last) for i in images]):
        found = join(given)
        assert torch.equal(found, exact)
        assert found.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(join, (images,))


@torch.no_grad()
def test_a_single_image_that_came_from_tokens_stays_channels_last() -> None:
    """Its stride over samples is not what PyTorch's cat takes for channels-last."""
    image = torch.randn(1, 16, 8).transpose(1, 2).reshape(1, 8, 4, 4)
    odd = image.as_strided(image.shape, (8, *image.stride()[1:]))
    other = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    found = join([odd, other])
    assert torch.equal(found, torch.cat([image, other], 1))
    assert found.is_contiguous(memory_format=torch.channels_last)


class Cats(nn.Module):
    """Of channels, of rows, of tokens, and of channels once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = torch.cat([h, h], -3)
        h = self.last(torch.cat([h, h], 2))
        tokens = torch.cat([h.flatten(2), h.flatten(2)], 1)
        return tokens.sum((1, 2)) + torch.cat([h, h], 1).sum((1, 2, 3))


@torch.no_grad()
def test_only_channels_of_images_are_joined() -> None:
    model, x = Cats().eval(), torch.randn(2, 3, 4, 5)
    fast = optimize(model, (x,))
    assert "concatenate            2 of 4; 2 left: not channels of images" in fast.explain()
    assert torch.allclose(fast(x), model(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "other", [torch.ones(1, 2, 4, 5), torch.ones(2, 2, 4, 6), torch.ones(1, 2, 4, 6).double()]
)
def test_images_that_differ_are_refused(other: Tensor) -> None:
    with pytest.raises(ValueError, match="alike but for their channels"):
        join([torch.ones(1, 3, 4, 6), other])
