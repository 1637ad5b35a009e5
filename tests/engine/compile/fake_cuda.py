"""A CUDA device that computes shapes only, for machines without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stepfuse.engine.sampling.lint import without_bindings

DEVICE = torch.device("cuda", 0)


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, tensors made on "cuda" are fake, and whole networks can be exported with them.

    A convolution answers as cuDNN would: images and filters in channels-last give such images.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.MonkeyPatch.context() as patch, mode, without_bindings(), torch.no_grad():
        patch.setattr(torch._C, "_conv_determine_backend_memory_format", _like_cudnn)
        yield mode


def on_cuda(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A fake tensor of the same shape and strides, of another dtype where one is given."""
    dtype = tensor.dtype if dtype is None else dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=DEVICE)


def module_on_cuda(make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """The module that ``make`` builds, with fake weights: no memory is taken for them."""
    with torch.device("meta"):
        model = make().eval()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(on_cuda(p, dtype), requires_grad=False)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else on_cuda(b)
    return model


def _like_cudnn(image: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    last = torch.channels_last
    if image.dim() == 4 and any(v.is_contiguous(memory_format=last) for v in (image, weight)):
        return last
    return torch.contiguous_format
