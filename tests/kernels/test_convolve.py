"""The operator: every form against the formula in float64, at odd sizes, with a norm or without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.networks import distance
from torch import Tensor

from stepfuse.engine.compile.stopwatch import blank_filters
from stepfuse.kernels.convolve import (
    FORMS,
    NO_NORM,
    CallSite,
    Form,
    convolve,
    filters,
    fits,
    native,
    why_not,
)

# sums of a few hundred terms in another order, of up to four pixels and nine weights each
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}  # bfloat16: three roundings of 2^-9
SHAPES = [
    (1, 32, 2, 2),  # one tile
    (2, 64, 6, 10),
    (3, 32, 8, 6),
    (5, 32, 4, 4),  # samples in groups
    (1, 96, 34, 64),  # strips, and a remainder of positions
    (3, 32, 1, 2),  # an odd height
    (2, 32, 5, 3),  # an odd width
]
NORMS = ("no norm", "norm", "everything")

pytestmark = pytest.mark.skipif(native is None, reason="needs the C++ module (a C++ compiler)")
needs_bfloat16 = pytest.mark.skipif(bool(why_not(torch.bfloat16)), reason="needs AVX512-BF16 (CPU)")
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)


def weight_for(form: Form, channels_out: int, channels: int) -> Tensor:
    kernel = (1, 1) if form == "dense" else (3, 3)
    return torch.randn(channels_out, channels, *kernel) / channels**0.5


def exactly(x: Tensor, weight: Tensor, form: Form, stride: int) -> Tensor:
    """In the dtype of x, by PyTorch."""
    if form == "dense" and x.dim() == 3:
        return F.linear(x, weight.flatten(1))
    if form == "enlarged":
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(x, weight, padding=weight.shape[2] // 2, stride=stride)


def norm_of(kind: str, n: int, c: int) -> tuple[tuple[Any, ...], Any]:
    """The operator's arguments for a norm, and the function they stand for."""
    if kind == "no norm":
        return NO_NORM, lambda x: x
    weight, bias = torch.randn(c), torch.randn(c)
    if kind == "norm":
        arguments = (4, 1e-3, weight, bias, None, None, None, False)
        return arguments, lambda x: F.group_norm(x, 4, weight.double(), bias.double(), 1e-3)
    scale, shift, add = (torch.randn(n, c) for _ in range(3))

    def function(x: Tensor) -> Tensor:
        spread = [v.double()[:, :, None, None] for v in (scale, shift, add)]
        y = F.group_norm(x + spread[2], 8, weight.double(), bias.double(), 1e-5)
        return F.silu(y * (1 + spread[0]) + spread[1])

    return (8, 1e-5, weight, bias, scale, shift, add, True), function


def in_threads(threads: int, *arguments: Any) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found: Tensor = convolve(*arguments)
    finally:
        torch.set_num_threads(before)
    return found


@dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_it_is_the_convolution(form: Form, norm: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        if not fits(torch.Size(shape), 64, form):
            assert shape[2] % 2 or shape[3] % 2
            continue
        for stride in (1, 2) if form == "direct" else (1,):
            # a mean that is not zero, so that borders of a normalised image differ from its pixels
            x = (2 * torch.randn(shape) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
            weight, bias = weight_for(form, 64, shape[1]), 10 * torch.randn(64)
            arguments, function = norm_of(norm, *shape[:2])
            exact = exactly(function(x.double()), weight.double(), form, stride)
            residual = torch.randn(exact.shape).to(dtype)
            exact = exact + bias.double()[:, None, None] + residual.double()
            u = filters(weight, form, dtype)
            plain = filters(weight, form, dtype, plain=True)
            if plain.shape != u.shape:
                found = in_threads(2, x, plain, bias, residual, form, stride, *arguments)
                assert distance(found, exact) < TOLERANCE[dtype], (shape, "plain filters")
            found = in_threads(1, x, u, bias, residual, form, stride, *arguments)
            assert found.dtype is dtype
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert distance(found, exact) < TOLERANCE[dtype], (shape, stride)
            # whatever the layout of the image, and the number of threads
            given = (x.contiguous(), u, bias, residual, form, stride, *arguments)
            for threads in (2, 3):
                assert torch.equal(in_threads(threads, *given), found), (shape, stride, threads)


@dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_two_images_are_read_as_one(form: Form, norm: str, dtype: torch.dtype) -> None:
    """Groups of a norm may lie across the two; threads share one sample, or have several each."""
    for n, h, w in ((1, 6, 10), (5, 4, 4), (1, 34, 64)):
        for channels in ((32, 32), (64, 32), (32, 96)):
            parts = [torch.randn(n, c, h, w).to(dtype) + i for i, c in enumerate(channels)]
            x = torch.cat(parts, 1).contiguous(memory_format=torch.channels_last)
            arguments, _ = norm_of(norm, n, sum(channels))
            u, bias = filters(weight_for(form, 64, x.shape[1]), form, dtype), torch.randn(64)
            given = (u, bias, None, form, 1, *arguments)
            for threads in (1, 2):
                one = in_threads(threads, x, *given)
                assert torch.equal(in_threads(threads, parts[0], *given, parts[1]), one)


def test_images_side_by_side_must_be_alike() -> None:
    u, x = filters(torch.randn(32, 96, 1, 1), "dense", torch.float32), torch.randn(2, 64, 4, 4)
    for other in (torch.randn(2, 32, 4, 5), torch.randn(1, 32, 4, 4), torch.randn(2, 32, 16)):
        with pytest.raises(ValueError, match="alike but for C"):
            convolve(x, u, None, None, "dense", 1, *NO_NORM, other)
    with pytest.raises(ValueError, match="alike but for C"):
        convolve(x, u, None, None, "dense", 1, *NO_NORM, torch.randn(2, 32, 4, 4).double())
    with pytest.raises(ValueError, match=r"must have a multiple of .* channels; got 64 and 33"):
        convolve(x, u, None, None, "dense", 1, *NO_NORM, torch.randn(2, 33, 4, 4))
    with pytest.raises(ValueError, match="does not fit filters"):
        convolve(x, u, None, None, "dense", 1, *NO_NORM, torch.randn(2, 64, 4, 4))


@dtypes
@pytest.mark.parametrize("norm", ["no norm", "norm"])
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 17, 96), (3, 300, 64)])
@torch.no_grad()
def test_it_is_a_linear_layer_on_tokens(
    shape: tuple[int, int, int], norm: str, dtype: torch.dtype
) -> None:
    n, length, c = shape
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(160, c) / c**0.5, torch.randn(160)
    arguments, function = norm_of(norm, n, c)
    normed = function(x.double().transpose(1, 2)).transpose(1, 2)
    residual = torch.randn(n, length, 160).to(dtype)
    exact = F.linear(normed, weight.double(), bias.double()) + residual.double()
    u = filters(weight, "dense", dtype)
    found = in_threads(1, x, u, bias, residual, "dense", 1, *arguments)
    assert found.is_contiguous()
    assert distance(found, exact) < TOLERANCE[dtype]
    assert torch.equal(in_threads(2, x, u, bias, residual, "dense", 1, *arguments), found)


@needs_bfloat16
@torch.no_grad()
def test_a_folded_norm_is_more_exact_than_one_that_is_written() -> None:
    """Its result is not rounded before the transform rounds it."""
    x = torch.randn(2, 64, 16, 16).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = weight_for("squares", 64, 64)
    arguments, function = norm_of("everything", 2, 64)
    normed = function(x.double())
    exact = exactly(normed, weight.double(), "squares", 1)
    u = filters(weight, "squares", torch.bfloat16)
    folded = convolve(x, u, None, None, "squares", 1, *arguments)
    written = convolve(normed.to(torch.bfloat16), u, None, None, "squares", 1, *NO_NORM)
    assert distance(folded, exact) < 0.95 * distance(written, exact)


@dtypes
@torch.no_grad()
def test_every_pixel_is_written_and_nan_stays_where_it_belongs(dtype: torch.dtype) -> None:
    for form in FORMS:
        x = torch.zeros(1, 32, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
        u, bias = filters(weight_for(form, 32, 32), form, dtype), torch.arange(32.0)
        y = convolve(x, u, bias, None, form, 1, *NO_NORM)
        assert torch.equal(y, bias.to(dtype)[:, None, None].expand_as(y))
        x[0, 3, 0, 0] = torch.nan
        y = convolve(x, u, bias, None, form, 1, *NO_NORM)
        assert y[0, :, 0, 0].isnan().all()
        assert not y[0, :, 4:, 4:].isnan().any()


@pytest.mark.parametrize("form", FORMS)
def test_blank_filters_have_the_shape_of_real_ones(form: Form) -> None:
    weight = weight_for(form, 64, 32)
    real = filters(weight, form, torch.float32)
    blank = blank_filters(weight.shape, (form,), torch.float32)[form]
    assert blank.shape == real.shape
    assert blank.dtype == real.dtype


def test_filters_of_another_network_are_refused() -> None:
    u = filters(torch.randn(32, 64, 3, 3), "lines", torch.float32)
    with pytest.raises(ValueError, match="does not fit filters"):
        convolve(torch.randn(1, 32, 4, 4), u, None, None, "lines", 1, *NO_NORM)
    with pytest.raises(ValueError, match="does not fit filters"):
        convolve(torch.randn(1, 64, 4, 4), u, None, None, "dense", 1, *NO_NORM)
    with pytest.raises(ValueError, match="'lines' needs an even size; got 4x3"):
        convolve(torch.randn(1, 64, 4, 3), u, None, None, "lines", 1, *NO_NORM)


@pytest.mark.parametrize("form", FORMS)
def test_the_operator_has_shapes_without_data(form: Form) -> None:
    x, weight = torch.randn(2, 32, 6, 4), weight_for(form, 64, 32)
    u = filters(weight, form, torch.float32)
    norm = norm_of("everything", 2, 32)[0]
    torch.library.opcheck(convolve, (x, u, torch.randn(64), None, form, 1, *norm))
    if form == "direct":
        torch.library.opcheck(convolve, (x, u, None, None, form, 2, *NO_NORM))
    twice = filters(weight_for(form, 64, 64), form, torch.float32)
    torch.library.opcheck(convolve, (x, twice, None, None, form, 1, *NO_NORM, x + 1))
    if form == "dense":
        torch.library.opcheck(convolve, (x.flatten(2).mT, u, None, None, form, 1, *NO_NORM))


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets_agree(isa: str) -> None:
    """In a process of their own, since the module is chosen at import."""
    code = """
import torch, torch.nn.functional as F
from stepfuse.kernels.attend import attend
from stepfuse.kernels.convolve import FORMS, convolve, filters
torch.manual_seed(0)
x, b, g = torch.randn(2, 64, 6, 10), torch.randn(32), torch.ones(64)
normed = F.silu(F.group_norm(x.double(), 4))
for form in FORMS:
    w = torch.randn(32, 64, *((1, 1) if form == "dense" else (3, 3)))
    norm = (4, 1e-5, g, None, None, None, None, True)
    y = convolve(x, filters(w, form, x.dtype), b, None, form, 1, *norm)
    z = F.interpolate(normed, scale_factor=2) if form == "enlarged" else normed
    exact = F.conv2d(z, w.double(), b.double(), padding=w.shape[2] // 2)
    assert float((y - exact).norm() / exact.norm()) < 3e-6, form
q, k, v = torch.randn(2, 3, 17, 10), torch.randn(2, 3, 21, 10), torch.randn(2, 3, 21, 7)
exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
assert float((attend(q, k, v, 10**-0.5) - exact).norm() / exact.norm()) < 3e-6

# whole vectors are 8 channels here, or 16: other layers take other forms
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.networks.unet import UNet, UNetConfig
config = UNetConfig(base_channels=16, channel_multipliers=(1, 2), blocks_per_level=1, norm_groups=4)
model = UNet(config).eval()
for p in model.parameters():
    if p.dim() > 1:
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
inputs = (torch.randn(2, 3, 10, 6), torch.tensor([3, 700]))
with torch.no_grad():
    fast, exact = optimize(model, inputs)(*inputs), model(*inputs)
assert float((fast - exact).norm() / exact.norm()) < 3e-6
print("agrees")
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "STEPFUSE_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if "must be one of" in found.stderr:
        pytest.skip(f"needs a CPU with {isa}")
    assert found.stdout.strip() == "agrees", found.stderr


@torch.no_grad()
def test_a_place_in_a_network_follows_what_changes() -> None:
    """Constants rewritten in place or bound anew, other shapes, other dtypes of modulations."""
    site = CallSite()
    x = torch.randn(2, 32, 4, 6).contiguous(memory_format=torch.channels_last)
    u = filters(weight_for("lines", 32, 32), "lines", torch.float32)
    bias, weight = torch.randn(32), torch.randn(32)
    modulation = torch.randn(2, 96)
    scale, shift, add = modulation.chunk(3, 1)  # rows with gaps

    def check(*given: Any) -> None:
        assert torch.equal(site(*given), convolve(*given))

    def arguments(x: Tensor, bias: Any, **changed: Any) -> tuple[Any, ...]:
        v = {"scale": scale, "shift": shift, "add": add, "weight": weight} | changed
        norm = (4, 1e-5, v["weight"], None, v["scale"], v["shift"], v["add"], True)
        return (x, u, bias, x, "lines", 1, *norm)

    check(*arguments(x, bias))
    held = site.prepared
    assert held is not None
    x.mul_(0.5)
    modulation.mul_(-2)
    bias.add_(1)
    u.mul_(3)
    check(*arguments(x, bias))
    check(*arguments(x.contiguous(), bias, add=add.to(torch.float64), scale=scale.mT.clone().mT))
    assert site.prepared is held, "all of this is read anew"
    check(*arguments(x, bias, weight=weight + 1))
    check(*arguments(torch.randn(1, 32, 2, 2), bias, scale=scale[:1], shift=shift[:1], add=add[:1]))
    assert site.prepared is not held
    narrow = bias.to(torch.bfloat16)
    check(*arguments(x, narrow))
    assert site.prepared is None, "a converted copy would not follow the constant"
    narrow.mul_(2)
    check(*arguments(x, narrow))


@pytest.mark.parametrize("name", ["bias", "residual", "weight", "offset", "scale", "shift", "add"])
def test_parameters_of_another_shape_are_refused(name: str) -> None:
    u = filters(torch.randn(64, 32, 1, 1), "dense", torch.float32)
    given = {"bias": torch.ones(64), "residual": torch.ones(2, 64, 3, 3)}
    given |= {key: torch.ones(32) for key in ("weight", "offset")}
    given |= {key: torch.ones(2, 32) for key in ("scale", "shift", "add")}
    assert given[name].dim() > 0
    given[name] = given[name][..., 1:]
    bias, residual, *norm = given.values()
    with pytest.raises(ValueError, match=f"{name} must be"):
        convolve(torch.ones(2, 32, 3, 3), u, bias, residual, "dense", 1, 4, 1e-5, *norm, False)


def test_groups_that_do_not_divide_are_refused() -> None:
    u = filters(torch.randn(32, 32, 1, 1), "dense", torch.float32)
    norm = (5, 1e-5, None, None, None, None, None, False)
    with pytest.raises(ValueError, match="groups must divide the 32 channels; got 5"):
        convolve(torch.ones(1, 32, 2, 2), u, None, None, "dense", 1, *norm)


def test_other_dtypes_are_refused() -> None:
    u = filters(torch.randn(32, 32, 1, 1), "dense", torch.float64)
    with pytest.raises(ValueError, match="cannot run here: not for"):
        convolve(torch.ones(1, 32, 2, 2).double(), u, None, None, "dense", 1, *NO_NORM)


def test_filters_may_lie_in_any_order() -> None:
    x, u = torch.randn(1, 32, 4, 4), filters(torch.randn(64, 32, 1, 1), "dense", torch.float32)
    turned = u.transpose(3, 4).contiguous().transpose(3, 4)
    exact = convolve(x, u, None, None, "dense", 1, *NO_NORM)
    assert torch.equal(convolve(x, turned, None, None, "dense", 1, *NO_NORM), exact)
