"""Each pass by itself: the same function, and the graph it should leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.networks import ONEDNN_DTYPES, distance, only, own, small, traced
from torch import Tensor, nn
from torch.fx import Node

from stepfuse.engine.compile.graph import SDPA, PassContext, aten, calls
from stepfuse.engine.compile.layers import mkldnn
from stepfuse.engine.compile.optimize import Optimized, optimize
from stepfuse.engine.compile.pass_order import PASSES
from stepfuse.engine.compile.passes.attention import (
    attention,
    batched,
    by_operator,
    one_by_one,
)
from stepfuse.engine.compile.passes.fuse_group_norm_silu import fuse_group_norm_silu
from stepfuse.engine.compile.passes.lower_precision import lower_precision
from stepfuse.engine.compile.passes.remove_no_ops import remove_no_ops
from stepfuse.engine.compile.rewrite import rewrite
from stepfuse.engine.compile.stages import assign
from stepfuse.engine.compile.tracing.trace import CannotTrace, trace
from stepfuse.kernels.group_norm_silu import OP

# float32 sums in another order: 1e-7 each, over a few hundred terms
REORDERED = 2e-6
# these need a dtype, attention or a stopwatch
NOT_ALONE = ("lower_precision", "upsampled_convolutions", "attention", "convolution_forms")
# `small` has no 1-dimensional convolution, attention, linear layers that read the same, or channels
# in whole vectors, and only `channels_last` lets its cat be of such images
NOT_ALONE += ("widen_conv1d", "gather_attention", "merge_linears", "fold_group_norm", "concatenate")
NOT_ALONE += ("read_side_by_side",)
ALONE = [pass_.__name__ for pass_ in PASSES if pass_.__name__ not in NOT_ALONE]


def report(fast: Optimized, name: str) -> Any:
    return next(r for r in fast.reports if r.name == name)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_a_pass_alone_keeps_the_function(name: str, scale_shift: bool) -> None:
    model, inputs = small(scale_shift)
    # a residual is added by a packed convolution, so that it cannot stand alone
    needed = [name, "prepack_convolutions"] if name == "fuse_residual_add" else [name]
    fast = optimize(model, inputs, without=only(*needed))
    assert distance(fast(*inputs), model(*inputs)) < REORDERED
    done = report(fast, name)
    assert done.matched > 0
    assert done.matched == done.candidates, str(done)


@torch.no_grad()
def test_no_pass_at_all_is_the_exported_network() -> None:
    model, inputs = small()
    fast = optimize(model, inputs, without=only())
    assert torch.equal(fast(*inputs), model(*inputs))


def test_no_ops_are_bypassed_and_real_work_stays() -> None:
    def function(x: Tensor) -> Tensor:
        x = F.dropout(x / 1.0 * 1, 0.5, training=False).to(torch.float32)
        return (x + 0).detach() / 2

    gm = traced(function, torch.randn(3, 5)).gm
    remove_no_ops(gm, PassContext())
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.div.Tensor]


def test_training_dropout_is_reported() -> None:
    gm = traced(lambda x: F.dropout(x, 0.5, training=True), torch.randn(3, 5)).gm
    assert remove_no_ops(gm, PassContext()).left == {"dropout in training mode": 1}


NORM = [torch.randn(2, 6, 5, 3), torch.randn(2, 6, 1, 1), torch.randn(2, 6, 1, 1)]


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (lambda x, a, b: F.group_norm(x, 3), ""),
        (lambda x, a, b: F.silu(F.group_norm(x, 2)), "1 with SiLU"),
        (lambda x, a, b: F.group_norm(a + x, 2), "1 with add"),
        (lambda x, a, b: F.group_norm(x, 6) * (a + 1) + b, "1 with scale-shift"),
        (lambda x, a, b: F.silu(b + (1 + a) * F.group_norm(x, 1)), "1 with SiLU, 1 with sca"),
        (lambda x, a, b: F.group_norm(x.flatten(2), 2, eps=0.5), ""),
    ],
)
@torch.no_grad()
def test_what_belongs_to_a_group_norm_is_fused(function: Any, note: str) -> None:
    found = traced(function, *NORM)
    done = fuse_group_norm_silu(found.gm, PassContext())
    assert (done.matched, done.candidates) == (1, 1)
    assert done.note.startswith(note)
    targets = [n.target for n in calls(found.gm, OP, aten.silu.default, aten.mul.Tensor)]
    assert targets == [OP]
    assert distance(found.gm(*NORM)[0], function(*NORM)) < REORDERED


@pytest.mark.parametrize(
    "function",
    [
        lambda x, a, b: (lambda y: F.silu(y) + y)(F.group_norm(x, 2)),  # read twice
        lambda x, a, b: (lambda y: F.group_norm(y, 2) + y)(x + a),
        lambda x, a, b: F.group_norm(torch.add(x, a, alpha=2), 2),
        lambda x, a, b: F.group_norm(x, 2) * (a + 2) + b,
        lambda x, a, b: F.group_norm(x, 2) * (a + 1) + x,  # the shift is an image
        lambda x, a, b: F.group_norm(x[:1] + a, 2),  # the sum has more samples than x
        lambda x, a, b: F.silu(x * 2),
    ],
)
@torch.no_grad()
def test_what_looks_alike_keeps_its_meaning(function: Any) -> None:
    found = traced(function, *NORM)
    fuse_group_norm_silu(found.gm, PassContext())
    assert distance(found.gm(*NORM)[0], function(*NORM)) < REORDERED


@torch.no_grad()
def test_residuals_are_written_over_only_what_nobody_reads() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            once = a + self.b(x)  # over a's result
            kept = once + self.c(once)  # not over `once`, which is read again
            return once * kept + torch.add(x, self.a(kept), alpha=3)

    model, x = Sums().eval(), torch.randn(2, 4, 5, 7)
    fast = optimize(model, (x,))
    done = report(fast, "fuse_residual_add")
    assert (done.matched, done.note) == (2, "1 in place")
    assert done.left == {"a scaled sum": 1}
    before = x.clone()
    assert distance(fast(x), model(x)) < REORDERED
    assert torch.equal(x, before)
    assert torch.equal(fast(x), fast(x))


class Tokens(nn.Module):
    """Residuals around linear layers: of tokens, and of tokens that become an image again."""

    def __init__(self, back: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b, self.flat = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        image = self.conv(x)
        tokens = image.flatten(2).transpose(1, 2)
        tokens = tokens + self.a(tokens)
        y = self.b(tokens)
        if self.back == "transpose":
            y = y.transpose(-1, -2).reshape(image.shape)
        else:
            y = y.reshape(-1, *image.shape[2:], 4).permute(0, 3, 1, 2).contiguous()
        image = y + image
        flat = image.flatten(2)
        out: Tensor = (flat + self.flat(flat)).reshape(image.shape) * 2
        return out


@pytest.mark.parametrize("dtype", ONEDNN_DTYPES)
@pytest.mark.parametrize("back", ["transpose", "permute"])
@torch.no_grad()
def test_residuals_of_tokens_are_added_by_the_linear_layer(
    back: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepfuse.engine.compile.network.pays", lambda *_: True)
    model, x = Tokens(back).eval(), torch.randn(2, 3, 5, 7)
    fast = optimize(model, (x,), dtype)
    done = report(fast, "fuse_residual_add")
    assert (done.matched, done.candidates) == (3, 3), str(done)
    off = optimize(model, (x,), dtype, without=["fuse_residual_add"])
    # bfloat16: a sum rounded once instead of twice
    tolerance = REORDERED if dtype is None else 1e-2
    assert distance(fast(x), model(x)) < tolerance
    assert distance(off(x), fast(x)) < tolerance


@torch.no_grad()
def test_residuals_that_would_be_copied_are_left() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            twice = self.a(x)
            # a residual whose rows are columns, and a result that is read twice
            return y + (x * 2).transpose(1, 2) + twice * (x + twice)

    model, x = Turned().eval(), torch.randn(2, 6, 6)
    fast = optimize(model, (x,), without=["merge_linears"])
    assert report(fast, "fuse_residual_add").left == {
        "the residual lies in memory in another order": 1,
        "the product's result is read elsewhere": 1,
    }
    assert distance(fast(x), model(x)) < REORDERED


@pytest.mark.parametrize("width", [8, 40, 512])
@pytest.mark.parametrize("form", [batched, one_by_one, by_operator])
@torch.no_grad()
def test_attention_written_out_is_attention(form: Any, width: int) -> None:
    heads = 1 if form is one_by_one else 3
    parts = [torch.randn(2, n, heads, width).transpose(1, 2) for n in (7, 5, 5)]
    written = form(lambda target, *args: target(*args), *parts, 0.3)
    assert distance(written, F.scaled_dot_product_attention(*parts, scale=0.3)) < REORDERED


@torch.no_grad()
def test_attention_is_written_out_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = F.scaled_dot_product_attention(q, k, v)
        return plain + F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = [torch.randn(2, 1, 6, 10) for _ in range(3)]
    several = ([4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 1.0, 3.0], [4.0, 1.0, 2.0, 3.0])
    for times, matched in (*((t, 1) for t in several), ([1.0, 2.0, 3.0, 4.0], 0)):
        monkeypatch.setattr(
            "stepfuse.engine.compile.passes.attention._seconds", lambda *_, t=times: t
        )
        found = traced(function, *inputs)
        done = attention(found.gm, PassContext())
        assert done.matched == matched
        assert done.left["masked, causal or with dropout"] == 1
        assert len(calls(found.gm, SDPA)) == 2 - matched
        assert distance(found.gm(*inputs)[0], function(*inputs)) < REORDERED


def test_time_alone_is_hoisted_and_the_class_is_not() -> None:
    model, inputs = own(num_classes=3)
    labels = torch.tensor([0, 2])
    without_class = optimize(model, inputs)
    with_class = optimize(model, (*inputs, {"labels": labels}))
    (free,), (bound,) = (
        [r for n in f.networks for r in n.reports if r.name == "hoist_timestep"]
        for f in (without_class, with_class)
    )
    assert "8 results" in free.note, free.note
    assert "1 results" in bound.note, bound.note
    with torch.no_grad():
        expected = model(*inputs, labels=labels)
        assert distance(with_class(*inputs, labels=labels), expected) < REORDERED
        assert distance(without_class(*inputs), model(*inputs)) < REORDERED


@pytest.mark.parametrize("announced", [False, True])
@torch.no_grad()
def test_samples_of_one_timestep_that_differ_have_no_table(announced: bool) -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = own(num_classes=3)[0]
            self.register_buffer("labels", torch.tensor([0, 2]))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.model(x, t, labels=self.labels)
            return out

    model, (x, t) = Labelled().eval(), own()[1]
    fast = optimize(model, (x, t), timesteps=[3, 700] if announced else ())
    assert distance(fast(x, t), model(x, t)) < REORDERED
    fast.prepare([9])
    model.labels.copy_(torch.tensor([1, 1]))
    fast.refresh()
    for pair in ([9, 9], [3, 9]):
        assert distance(fast(x, torch.tensor(pair)), model(x, torch.tensor(pair))) < REORDERED


def test_a_timestep_that_is_no_vector_is_left() -> None:
    fast = optimize(nn.Conv2d(3, 3, 1), (torch.randn(1, 3, 4, 4),))
    assert report(fast, "hoist_timestep").note == "no timestep [N] as the second argument"


def _weight(node: Node) -> str:
    """Which weight a convolution reads, cast or not."""
    source = node.args[1]
    while isinstance(source, Node) and source.op != "placeholder":
        source = source.args[0]
    assert isinstance(source, Node)
    return str(source.meta["weight"])


def test_bfloat16_where_it_pays_and_float32_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    able = "stepfuse.engine.compile.passes.lower_precision.has_instructions"
    monkeypatch.setattr(able, lambda *_: True)  # whatever this CPU has
    model, inputs = small()
    found = trace(model, inputs, {})
    assign(found.gm)

    def pays(node: Node, dtype: torch.dtype) -> bool:
        return _weight(node) != "last.weight"

    done = lower_precision(found.gm, PassContext(dtype=torch.bfloat16, pays=pays))
    assert done.left["float32 is as fast for their shape"] == 1
    assert done.left["vectors [N, C]"] == 4
    dtypes = {_weight(n): n.meta["val"].dtype for n in calls(found.gm, aten.conv2d.default)}
    assert dtypes.pop("last.weight") is torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    (result,) = found.gm.graph.output_node().all_input_nodes
    assert result.meta["val"].dtype is torch.float32


@pytest.mark.parametrize("scale_shift", [False, True])
@torch.no_grad()
def test_bfloat16_is_no_worse_than_eager_bfloat16(scale_shift: bool) -> None:
    model, inputs = small(scale_shift)
    expected = model(*inputs)
    fast = optimize(model, inputs, dtype=torch.bfloat16)
    result = fast(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(*inputs)
    assert result.dtype is torch.float32
    assert distance(result, expected) < max(distance(eager, expected), 4e-3)


def test_weights_are_packed_once() -> None:
    model, inputs = small()
    found = trace(model, inputs, {})
    rewrite(found.gm, PASSES, PassContext(found.time))
    packs = calls(found.gm, mkldnn._reorder_convolution_weight.default)
    assert len(packs) == 8
    assert {n.meta["stage"] for n in packs} == {"weights"}
    assert not calls(found.gm, aten.conv2d.default)


def test_convolutions_oneDNN_does_not_take_are_left() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, x[:2, :, :1, :1])

    fast = optimize(Mixed(), (torch.randn(3, 4, 5, 5),))
    assert report(fast, "prepack_convolutions").left == {
        "the weight is computed from the inputs": 1
    }
    fast = optimize(nn.Conv2d(3, 3, 1).double(), (torch.randn(1, 3, 4, 4).double(),))
    (reason,) = report(fast, "prepack_convolutions").left
    assert reason == "torch.float64 activations and torch.float64 weights"


def test_a_module_with_control_flow_on_values_has_no_graph() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CannotTrace):
        trace(Branch(), (torch.randn(2, 2),), {})


def test_on_another_device_the_same_passes_apply_without_oneDNN() -> None:
    model, (x, t) = own(scale_shift=True, head_channels=16)
    found = trace(model.to("meta"), (x.to("meta"), t.to("meta")), {})
    context = PassContext(found.time, torch.bfloat16)
    done = {r.name: r for r in rewrite(found.gm, PASSES, context)}
    for name in ("hoist_timestep", "lower_precision", "channels_last"):
        assert done[name].matched > 0, str(done[name])
    for name in ("attention", "prepack_convolutions"):
        assert (done[name].matched, set(done[name].left)) == (0, {"not on the CPU"})
    for name in ("merge_linears", "concatenate", "convolution_forms", "fuse_residual_add"):
        assert done[name].matched == 0, str(done[name])
    called = {str(n.target) for n in found.gm.graph.nodes if n.op == "call_function"}
    assert not [name for name in called if name.startswith("mkldnn")]


@torch.no_grad()
def test_attention_of_another_sign_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stepfuse.engine.compile.passes.attention._seconds", lambda *_: [2.0, 1.0, 1.0]
    )

    def function(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, scale=-0.5)

    found = traced(function, torch.randn(1, 2, 6, 10))
    assert attention(found.gm, PassContext()).left == {"a scale that is not positive": 1}
