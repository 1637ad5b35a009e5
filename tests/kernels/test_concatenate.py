"""Images side by side against the reference, to the bit, in any dtype and layout."""

from __future__ import annotations

import pytest
import torch
from op_cases import Poisoned, in_threads, negated
from torch import Tensor

from stepfuse.kernels.concatenate import OP, concatenate
from stepfuse.kernels.reference import concatenate as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
SHAPES = [(1, 1, 1), (2, 5, 3), (1, 64, 64), (3, 17, 1)]  # samples, height, width


def images_of(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    n, h, w = shape
    return [(10 * torch.randn(n, c, h, w)).to(dtype) for c in (7, 1, 32)]


def oracle(images: list[Tensor]) -> Tensor:
    n, _, h, w = images[0].shape
    out = torch.empty(n, sum(image.shape[1] for image in images), h, w, dtype=images[0].dtype)
    reference.run(images, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_pytorchs(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    images = images_of(shape, dtype)
    assert torch.equal(oracle(images), torch.cat(images, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    images = images_of(shape, dtype)
    exact = oracle(images)
    channels_last = [i.contiguous(memory_format=torch.channels_last) for i in images]
    gaps = [torch.stack([i, i], -1)[..., 0] for i in images]
    for given in (images, channels_last, gaps):
        for threads in (1, 2):
            with in_threads(threads):
                found = concatenate(given)
            assert torch.equal(found, exact)
            assert found.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(OP, (images,))


@pytest.mark.parametrize("dtype", DTYPES[:-1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_may_have_its_place(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """All of it is written, and nothing around it; a place of another shape is left alone."""
    images = images_of(shape, dtype)
    expected = concatenate(images)
    out = Poisoned(expected)
    assert concatenate(images, out=out.tensor) is out.tensor
    assert torch.equal(out.check(), expected)
    other = torch.full((1, 2, 3, 4), 7.0, dtype=dtype)
    assert torch.equal(concatenate(images, out=other), expected)
    assert (other == 7).all()


def test_a_single_image_that_came_from_tokens_stays_channels_last() -> None:
    """Its stride over samples is not what PyTorch's cat takes for channels-last."""
    image = torch.randn(1, 16, 8).transpose(1, 2).reshape(1, 8, 4, 4)
    odd = image.as_strided(image.shape, (8, *image.stride()[1:]))
    other = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    found = concatenate([odd, other])
    assert torch.equal(found, torch.cat([image, other], 1))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("call", [OP, concatenate])
def test_a_pending_negation(call: object) -> None:
    images = [torch.randn(2, c, 3, 5).contiguous(memory_format=torch.channels_last) for c in (7, 1)]
    assert callable(call)
    assert torch.equal(call([negated(x) for x in images]), torch.cat(images, 1))


@pytest.mark.parametrize("call", [OP, concatenate])
@pytest.mark.parametrize(
    "other",
    [
        torch.ones(1, 2, 4, 5),
        torch.ones(2, 2, 4, 6),
        torch.ones(1, 2, 4, 6).double(),
        torch.ones(1, 2, 24),
    ],
)
def test_images_that_differ_are_refused(call: object, other: Tensor) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="alike but for their channels"):
        call([torch.ones(1, 3, 4, 6), other])
