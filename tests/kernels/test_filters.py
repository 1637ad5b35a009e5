"""Packed filters: what is in them, in which order, and which sizes they are for."""

from __future__ import annotations

import pytest
import torch
from op_cases import needs_module
from torch import Tensor

from stepfuse.kernels.filters import (
    FORMS,
    PRODUCTS,
    Form,
    filters,
    filters_shape,
    fits,
    is_plain,
    result_shape,
    whole_tiles,
)
from stepfuse.kernels.products import vector_channels

# G of one axis, as the papers print it, and which axes it is applied to
LINES = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]).double()
ENLARGED = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 1]]).double()
BLOCK = 128  # channels that are transformed at a time


def unpacked(u: Tensor) -> Tensor:
    """[frequencies, taps, K, C]."""
    blocks, frequencies, taps, c, wide, together = u.shape
    return u.permute(1, 2, 0, 4, 3, 5).reshape(frequencies, taps, blocks * wide, c * together)


def transformed(w: Tensor, form: Form) -> Tensor:
    """The same of w [K, C, 3, 3], an axis of the kernel after the other."""
    k, c = w.shape[:2]
    if form in ("dense", "direct"):
        return w.permute(3, 2, 0, 1).reshape(1, -1, k, c)
    if form == "lines":
        return torch.einsum("fj,kcij->fikc", LINES, w)
    g = LINES if form == "squares" else ENLARGED
    both = torch.stack([g @ row @ g.mT for row in w.flatten(0, 1)])  # G w G^T, [K C, 4, 4]
    return both.view(k, c, *both.shape[1:]).permute(3, 2, 0, 1).flatten(0, 1).unsqueeze(1)


@needs_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, BLOCK + 32])
@pytest.mark.parametrize("form", FORMS)
def test_filters_are_the_transform_rounded_once(
    form: Form, channels: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(64, channels, *((1, 1) if form == "dense" else (3, 3)))
    u = filters(weight, form, dtype)
    assert u.shape == filters_shape(weight.shape, form, dtype)
    assert u.shape[4:] == (vector_channels(), 2 if dtype is torch.bfloat16 else 1)
    assert torch.equal(unpacked(u), transformed(weight.double(), form).to(dtype))
    if form == "dense":
        assert torch.equal(filters(weight.flatten(1), form, dtype), u)


@needs_module
@pytest.mark.parametrize("form", FORMS)
def test_plain_filters_are_the_weight_itself(form: Form) -> None:
    weight = torch.randn(32, 32, *((1, 1) if form == "dense" else (3, 3)))
    plain = filters(weight, form, torch.float32, plain=True)
    assert torch.equal(unpacked(plain), transformed(weight, "direct"))
    assert is_plain(plain, form) == (form not in ("dense", "direct"))
    rounded = filters(weight, form, torch.bfloat16, plain=True)
    assert torch.equal(rounded, filters(weight, form, torch.bfloat16)), "it would round twice"
    assert not is_plain(rounded, form)


@needs_module
@pytest.mark.parametrize("form", FORMS)
def test_what_fits(form: Form) -> None:
    wide = vector_channels()
    for h, w in ((4, 6), (3, 6), (4, 5), (1, 1)):
        even = form not in ("lines", "squares") or w % 2 == 0
        even = even and (form != "squares" or h % 2 == 0)
        assert whole_tiles(h, w, form) == even
        assert fits((2, wide, h, w), 3 * wide, form) == even
        assert not fits((2, wide, h, w), wide + 1, form)
        assert not fits((2, wide - 1, h, w), wide, form)


def test_sizes_of_results() -> None:
    assert result_shape((2, 5, 8), 3, "dense", 1) == (2, 5, 3)
    for form in FORMS:
        size = 2 if form == "enlarged" else 1
        assert result_shape((2, 8, 6, 10), 3, form, 1) == (2, 3, size * 6, size * 10)
    assert result_shape((2, 8, 6, 9), 3, "direct", 2) == (2, 3, 3, 5)


def test_every_form_says_what_it_multiplies() -> None:
    assert tuple(PRODUCTS) == FORMS
    per_result = {"dense": 1, "direct": 1, "lines": 2, "squares": 4, "enlarged": 4}
    found = {form: f * taps / per_result[form] for form, (f, taps) in PRODUCTS.items()}
    assert found == {"dense": 1, "direct": 9, "lines": 6, "squares": 4, "enlarged": 2.25}
