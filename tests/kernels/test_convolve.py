"""The convolution: every form against the reference in float64, at odd sizes, with every norm."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convolve_cases import NORMS, by_pytorch, image, norm_of, oracle, run, weight_for
from op_cases import PRODUCT_DTYPES, distance, needs_bfloat16, needs_module
from torch import Tensor

from stepfuse.kernels.convolve import OP, ConvolveCall, convolve
from stepfuse.kernels.filters import FORMS, Form, filters, fits
from stepfuse.kernels.reference import convolve as reference

# relative L2: sums of a few hundred terms in another order, of up to four pixels and nine weights
# each; bfloat16: three roundings of 2^-9
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
DOUBLE = 1e-13  # the same sums in float64
SHAPES = [
    (1, 32, 2, 2),  # one tile
    (2, 64, 6, 10),
    (3, 32, 8, 6),
    (5, 32, 4, 4),  # samples in groups
    (1, 96, 34, 64),  # strips, and a remainder of positions
    (3, 32, 1, 2),  # an odd height
    (2, 32, 5, 3),  # an odd width
]

dtypes = pytest.mark.parametrize("dtype", PRODUCT_DTYPES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_reference_is_pytorchs(form: Form, norm: str) -> None:
    """The layers of a network, one after the other, in float64."""
    for n, c, h, w in SHAPES:
        for stride in (1, 2) if form == "direct" else (1,):
            given = {
                k: v.double() if isinstance(v, Tensor) else v
                for k, v in norm_of(norm, n, c).items()
            }
            x, weight = image(n, c, h, w).double(), weight_for(form, 24, c).double()
            call = ConvolveCall(
                x, weight, torch.randn(24).double(), form=form, stride=stride, **given
            )
            plain = reference.formula(*call.arguments())
            call = replace(call, residual=torch.randn(plain.shape).double())
            exact = by_pytorch(call, weight)
            assert distance(reference.formula(*call.arguments()), exact) < DOUBLE
            apart = replace(call, x=x[:, :8], beside=x[:, 8:])
            assert distance(reference.formula(*apart.arguments()), exact) < DOUBLE
            if form == "dense":
                tokens = replace(call, x=x.flatten(2).mT, residual=call.residual.flatten(2).mT)
                assert (
                    distance(reference.formula(*tokens.arguments()), exact.flatten(2).mT) < DOUBLE
                )


@needs_module
@dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_it_is_the_reference(form: Form, norm: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        if not fits(shape, 64, form):
            assert shape[2] % 2 or shape[3] % 2
            continue
        for stride in (1, 2) if form == "direct" else (1,):
            x, weight, bias = (
                image(*shape, dtype=dtype),
                weight_for(form, 64, shape[1]),
                10 * torch.randn(64),
            )
            u, plain = (filters(weight, form, dtype, plain) for plain in (False, True))
            call = ConvolveCall(x, u, bias, None, form, stride, **norm_of(norm, *shape[:2]))
            call = replace(call, residual=torch.randn(oracle(call, weight).shape).to(dtype))
            exact = oracle(call, weight)
            if plain.shape != u.shape:
                found = run(replace(call, u=plain), 2)
                assert distance(found, exact) < TOLERANCE[dtype], (shape, "plain filters")
            found = run(call)
            assert found.dtype is dtype
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert distance(found, exact) < TOLERANCE[dtype], (shape, stride)
            # whatever the layout of the image, and the number of threads
            for threads in (2, 3):
                again = run(replace(call, x=x.contiguous()), threads)
                assert torch.equal(again, found), (shape, stride, threads)


@needs_module
@dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_two_images_are_read_as_one(form: Form, norm: str, dtype: torch.dtype) -> None:
    """Groups of a norm may lie across the two; threads share one sample, or have several each."""
    for n, h, w in ((1, 6, 10), (5, 4, 4), (1, 34, 64)):
        for channels in ((32, 32), (64, 32), (32, 96)):
            first, second = (image(n, c, h, w, dtype=dtype) + i for i, c in enumerate(channels))
            x = torch.cat([first, second], 1).contiguous(memory_format=torch.channels_last)
            u, bias = filters(weight_for(form, 64, x.shape[1]), form, dtype), torch.randn(64)
            call = ConvolveCall(x, u, bias, form=form, **norm_of(norm, n, sum(channels)))
            for threads in (1, 2):
                apart = run(replace(call, x=first, beside=second), threads)
                assert torch.equal(apart, run(call, threads))


@needs_module
def test_images_side_by_side_must_be_alike() -> None:
    u, x = filters(torch.randn(32, 96, 1, 1), "dense", torch.float32), torch.randn(2, 64, 4, 4)
    for other in (torch.randn(2, 32, 4, 5), torch.randn(1, 32, 4, 4), torch.randn(2, 32, 16)):
        with pytest.raises(ValueError, match="alike but for C"):
            convolve(x, u, beside=other)
    with pytest.raises(ValueError, match="alike but for C"):
        convolve(x, u, beside=torch.randn(2, 32, 4, 4).double())
    with pytest.raises(ValueError, match=r"must have a multiple of .* channels; got 64 and 33"):
        convolve(x, u, beside=torch.randn(2, 33, 4, 4))
    with pytest.raises(ValueError, match="does not fit filters"):
        convolve(x, u, beside=torch.randn(2, 64, 4, 4))


@needs_module
@dtypes
@pytest.mark.parametrize("norm", ["no norm", "norm"])
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 17, 96), (3, 300, 64)])
@torch.no_grad()
def test_it_is_a_linear_layer_on_tokens(
    shape: tuple[int, int, int], norm: str, dtype: torch.dtype
) -> None:
    n, length, c = shape
    weight, bias = torch.randn(160, c) / c**0.5, torch.randn(160)
    u, residual = filters(weight, "dense", dtype), torch.randn(n, length, 160).to(dtype)
    call = ConvolveCall(image(*shape, dtype=dtype), u, bias, residual, **norm_of(norm, n, c))
    found = run(call)
    assert found.is_contiguous()
    assert distance(found, oracle(call, weight)) < TOLERANCE[dtype]
    assert torch.equal(run(call, 2), found)


@needs_bfloat16
@torch.no_grad()
def test_a_folded_norm_is_more_exact_than_one_that_is_written() -> None:
    """Its result is not rounded before the transform rounds it."""
    x, weight = image(2, 64, 16, 16, dtype=torch.bfloat16), weight_for("squares", 64, 64)
    norm = norm_of("everything", 2, 64)
    call = ConvolveCall(x, filters(weight, "squares", x.dtype), form="squares", **norm)
    identity = torch.eye(64)[:, :, None, None]
    normed = oracle(replace(call, form="dense"), identity).to(torch.bfloat16)
    written = convolve(normed, call.u, form="squares")
    exact = oracle(call, weight)
    assert distance(run(call), exact) < 0.95 * distance(written, exact)


@needs_module
@dtypes
@torch.no_grad()
def test_every_pixel_is_written_and_nan_stays_where_it_belongs(dtype: torch.dtype) -> None:
    for form in FORMS:
        x = torch.zeros(1, 32, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
        u, bias = filters(weight_for(form, 32, 32), form, dtype), torch.arange(32.0)
        y = convolve(x, u, bias, form=form)
        assert torch.equal(y, bias.to(dtype)[:, None, None].expand_as(y))
        x[0, 3, 0, 0] = torch.nan
        y = convolve(x, u, bias, form=form)
        assert y[0, :, 0, 0].isnan().all()
        assert not y[0, :, 4:, 4:].isnan().any()


@needs_module
def test_filters_of_another_network_are_refused() -> None:
    u = filters(torch.randn(32, 64, 3, 3), "lines", torch.float32)
    with pytest.raises(ValueError, match="does not fit filters"):
        convolve(torch.randn(1, 32, 4, 4), u, form="lines")
    with pytest.raises(ValueError, match="does not fit filters"):
        convolve(torch.randn(1, 64, 4, 4), u)
    with pytest.raises(ValueError, match="'lines' needs an even size; got 4x3"):
        convolve(torch.randn(1, 64, 4, 3), u, form="lines")
    with pytest.raises(ValueError, match=r"form must be one of dense, .*; got 'cubes'"):
        convolve(torch.randn(1, 64, 4, 4), u, form="cubes")


@needs_module
@pytest.mark.parametrize("form", FORMS)
def test_the_operator_has_shapes_without_data(form: Form) -> None:
    x, weight = torch.randn(2, 32, 6, 4), weight_for(form, 64, 32)
    call = ConvolveCall(x, filters(weight, form, torch.float32), torch.randn(64), form=form)
    checked = [replace(call, **norm_of("everything", 2, 32))]
    if form == "direct":
        checked.append(replace(call, stride=2))
    twice = filters(weight_for(form, 64, 64), form, torch.float32)
    checked.append(replace(call, u=twice, beside=x + 1))
    if form == "dense":
        checked.append(replace(call, x=x.flatten(2).mT))
    for each in checked:
        torch.library.opcheck(OP, each.arguments())


@needs_module
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets_agree(isa: str) -> None:
    """In a process of their own, since the module is chosen at import."""
    code = """
import torch, torch.nn.functional as F
from stepfuse.kernels.attention import attention
from stepfuse.kernels.convolve import convolve
from stepfuse.kernels.filters import FORMS, filters
torch.manual_seed(0)
x, b, g = torch.randn(2, 64, 6, 10), torch.randn(32), torch.ones(64)
normed = F.silu(F.group_norm(x.double(), 4))
for form in FORMS:
    w = torch.randn(32, 64, *((1, 1) if form == "dense" else (3, 3)))
    u = filters(w, form, x.dtype)
    y = convolve(x, u, b, form=form, groups=4, weight=g, silu=True)
    z = F.interpolate(normed, scale_factor=2) if form == "enlarged" else normed
    exact = F.conv2d(z, w.double(), b.double(), padding=w.shape[2] // 2)
    assert float((y - exact).norm() / exact.norm()) < 3e-6, form
q, k, v = torch.randn(2, 3, 17, 10), torch.randn(2, 3, 21, 10), torch.randn(2, 3, 21, 7)
exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
assert float((attention(q, k, v, 10**-0.5) - exact).norm() / exact.norm()) < 3e-6

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


@needs_module
@pytest.mark.parametrize("name", ["bias", "residual", "weight", "offset", "scale", "shift", "add"])
def test_parameters_of_another_shape_are_refused(name: str) -> None:
    u = filters(torch.randn(64, 32, 1, 1), "dense", torch.float32)
    shapes = {"bias": (64,), "residual": (2, 64, 3, 3), "weight": (32,), "offset": (32,)}
    shapes |= dict.fromkeys(("scale", "shift", "add"), (2, 32))
    given = {key: torch.ones(shape) for key, shape in shapes.items()}
    given[name] = given[name][..., 1:]
    with pytest.raises(ValueError, match=f"{name} must be"):
        convolve(torch.ones(2, 32, 3, 3), u, groups=4, **given)


@needs_module
def test_groups_that_do_not_divide_are_refused() -> None:
    u = filters(torch.randn(32, 32, 1, 1), "dense", torch.float32)
    with pytest.raises(ValueError, match="groups must divide the 32 channels; got 5"):
        convolve(torch.ones(1, 32, 2, 2), u, groups=5)


@needs_module
def test_what_the_module_cannot_run_is_refused() -> None:
    u = filters(torch.randn(32, 32, 1, 1), "dense", torch.float64)
    with pytest.raises(ValueError, match="cannot run here: not for"):
        convolve(torch.ones(1, 32, 2, 2).double(), u)
    with pytest.raises(ValueError, match="cannot run here: not on meta"):
        convolve(torch.ones(1, 32, 2, 2, device="meta"), u.float())


@needs_module
def test_filters_may_lie_in_any_order() -> None:
    x, u = torch.randn(1, 32, 4, 4), filters(torch.randn(64, 32, 1, 1), "dense", torch.float32)
    turned = u.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(convolve(x, turned), convolve(x, u))
