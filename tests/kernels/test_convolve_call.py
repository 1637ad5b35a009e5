"""Calls of the convolution: the order of their arguments, places in a network, where results go."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from convolve_cases import image, norm_of, run, weight_for
from op_cases import PRODUCT_DTYPES, Poisoned, needs_module, negated
from torch import Tensor

from stepfuse.kernels.convolve import OP, CallSite, ConvolveCall, convolve
from stepfuse.kernels.filters import FORMS, Form, filters
from stepfuse.kernels.reference import convolve as reference


def test_the_arguments_have_one_order() -> None:
    """In the schema, in a graph, of the function, at a place in a network, and of the reference."""
    names = [field.name for field in fields(ConvolveCall)]
    assert [argument.name for argument in OP._schema.arguments] == names
    for function in (convolve, CallSite().__call__):
        assert [*inspect.signature(function).parameters] == [*names, "out"]
    # the weight itself stands where others take its filters
    assert [*inspect.signature(reference.formula).parameters] == [names[0], "w", *names[2:]]
    defaults = inspect.signature(convolve).parameters
    assert {f.name: f.default for f in fields(ConvolveCall)[2:]} == {
        name: defaults[name].default for name in names[2:]
    }


@needs_module
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_result_may_have_its_place(form: Form, dtype: torch.dtype) -> None:
    """All of it is written, and nothing around it; a place of another shape is left alone."""
    for shape in ((1, 32, 6, 10), (3, 64, 2, 2)):
        x, u = image(*shape, dtype=dtype), filters(weight_for(form, 96, shape[1]), form, dtype)
        call = ConvolveCall(x, u, torch.randn(96), form=form, **norm_of("norm", *shape[:2]))
        expected, site = run(call), CallSite()
        other = torch.full((1, 2, 3, 4), 7.0, dtype=dtype)
        for place in (convolve, site, site):
            out = Poisoned(expected)
            assert place(*call.arguments(), out=out.tensor) is out.tensor
            assert torch.equal(out.check(), expected)
            assert torch.equal(place(*call.arguments(), out=other), expected)
        assert (other == 7).all()


@needs_module
@torch.no_grad()
def test_a_place_in_a_network_follows_what_changes() -> None:
    """Constants rewritten in place or bound anew, other shapes, other dtypes of modulations."""
    site = CallSite()
    x = image(2, 32, 4, 6)
    u = filters(weight_for("lines", 32, 32), "lines", torch.float32)
    bias, weight = torch.randn(32), torch.randn(32)
    modulation = torch.randn(2, 96)
    scale, shift, add = modulation.chunk(3, 1)  # rows with gaps
    parts = {"weight": weight, "scale": scale, "shift": shift, "add": add}
    call = ConvolveCall(x, u, bias, x, "lines", groups=4, **parts, silu=True)

    def check(**changed: Any) -> None:
        arguments = replace(call, **changed).arguments()
        assert torch.equal(site(*arguments), convolve(*arguments))

    check()
    held = site.prepared
    assert held is not None
    x.mul_(0.5)
    modulation.mul_(-2)
    bias.add_(1)
    u.mul_(3)
    check()
    contiguous = x.contiguous()
    turned = scale.mT.clone().mT
    check(x=contiguous, residual=contiguous, add=add.to(torch.float64), scale=turned)
    assert site.prepared is held, "all of this is read anew"
    check(weight=weight + 1)
    small = torch.randn(1, 32, 2, 2)
    check(x=small, residual=small, scale=scale[:1], shift=shift[:1], add=add[:1])
    assert site.prepared is not held
    narrow = bias.to(torch.bfloat16)
    check(bias=narrow)
    assert site.prepared is None, "a converted copy would not follow the constant"
    narrow.mul_(2)
    check(bias=narrow)


@needs_module
@torch.no_grad()
def test_a_pending_negation() -> None:
    """Of each tensor alone, and of all of them."""
    x, beside, residual = image(2, 64, 4, 6), image(2, 32, 4, 6), image(2, 32, 4, 6)
    u = filters(torch.randn(32, 96, 3, 3), "squares", torch.float32)
    norm = norm_of("everything", 2, 96)
    call = ConvolveCall(x, u, torch.randn(32), residual, "squares", **norm, beside=beside)
    expected = OP(*call.arguments())
    tensors = [f.name for f in fields(call) if isinstance(getattr(call, f.name), Tensor)]
    assert len(tensors) == 10
    for change in (*([name] for name in tensors), tensors):
        given = replace(call, **{name: negated(getattr(call, name)) for name in change})
        site = CallSite()
        for made in (OP, convolve, site, site):
            assert torch.equal(made(*given.arguments()), expected), change
