"""onnx: the file computes what the network does, is standard, and appears whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.export.export_case import CLASSES, exported, network
from tests.engine.export.export_case import SIDE as UNET_SIDE
from tests.engine.export.onnx_case import (
    LARGE,
    SCHEDULE,
    SIDE,
    Small,
    build_once,
    expected,
    export,
    inputs,
    run,
)
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.compile.optimize import Optimized
from stepfuse.engine.export.network import describe
from stepfuse.engine.export.to_onnx import graph as onnx_graph
from stepfuse.engine.export.to_onnx import network_file as onnx_file
from stepfuse.engine.export.to_onnx import write as onnx_write
from stepfuse.engine.export.to_onnx.graph import MODULE, CannotExport
from stepfuse.engine.files import writing
from stepfuse.engine.networks.unet_blocks import GroupNormSiLU

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

FLOAT32 = 2e-5  # of outputs of order 1..10: another order of summation through a small network
FLOAT16 = 3e-2  # roundings of 2^-11 through a dozen layers
BFLOAT16 = 2e-1  # the same with 2^-8


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `Small` with metadata."""
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    export(path, schedule=SCHEDULE, prediction_type="v_prediction")
    return path


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_unet_gives_what_its_reference_gives_in_float64(count: int) -> None:
    x = torch.randn(count, 1, UNET_SIDE, UNET_SIDE)
    t, labels = torch.tensor([0, 50, 99, 7])[:count], torch.tensor([CLASSES, 0, 2, 1])[:count]
    got = run(exported(), {"x": x, "t": t, "labels": labels})
    with torch.no_grad():
        torch.testing.assert_close(got, network()(x, t, labels), atol=FLOAT32, rtol=0)
        # the last label is no class
        null = network()(x[:1], t[:1], None)
    torch.testing.assert_close(got[:1], null, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_form_of_the_fused_norm(small: Path, count: int) -> None:
    check(small, Small(), *inputs(count))


def check(path: Path, model: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> None:
    """The file gives what the network does."""
    got = run(path, {"x": x, "t": t, **condition}).double()
    torch.testing.assert_close(got, expected(model, x, t, **condition), atol=FLOAT32, rtol=0)


def test_the_file_is_standard_and_says_nothing_of_the_machine() -> None:
    path = exported()
    model = onnx.load(path)
    onnx.checker.check_model(path, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    assert not model.functions
    kinds = Counter(node.op_type for node in model.graph.node)
    norms = sum(isinstance(module, GroupNormSiLU) for module in network().modules())
    assert kinds["GroupNormalization"] == norms
    assert kinds["Sigmoid"] > 0
    ports = {
        port.name: [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
        for port in (*model.graph.input, *model.graph.output)
    }
    image = ["batch", 1, UNET_SIDE, UNET_SIDE]
    assert ports == {"x": image, "t": ["batch"], "labels": ["batch"], "output": image}
    weights = {tensor.name for tensor in model.graph.initializer}
    named = dict(network().named_parameters())
    assert {"conv_in.weight", "class_embedding.weight"} <= weights & set(named)
    modules = {e.value for node in model.graph.node for e in node.metadata_props if e.key == MODULE}
    assert modules <= {"", *dict(network().named_modules())}
    assert "down.0.block.conv1" in modules
    content = path.read_bytes()
    assert str(Path(sf.__file__).parent.parent).encode() not in content
    assert b".py" not in content


def test_older_opsets_have_instance_norms_and_a_batch_may_be_fixed(tmp_path: Path) -> None:
    made = export(tmp_path / "old.onnx", opset=18, batch=1)
    assert made.metadata.opset == 18
    assert made.inputs["x"] == (1, 2, SIDE, SIDE)
    assert made.operators["InstanceNormalization"] == 2
    assert made.operators["GroupNormalization"] == 0
    check(made.path, Small(), *inputs(1))


@pytest.mark.parametrize(("precision", "code"), [("fp16", 10), ("bf16", 16)])
def test_half_precision_computes_in_it_behind_a_float32_interface(
    tmp_path: Path, precision: str, code: int
) -> None:
    made = export(tmp_path / "half.onnx", precision=precision, verify=True)
    assert "promoted to float32: max abs" in made.verified
    path, model = made.path, onnx.load(made.path)
    onnx.checker.check_model(path, full_check=True)
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert {types[f"{n}.weight"] for n in ("conv_in", "conv_out", "norm1", "table")} == {code}
    ports = {
        p.name: p.type.tensor_type.elem_type for p in (*model.graph.input, *model.graph.output)
    }
    assert ports == {"x": 1, "t": 7, "labels": 7, "output": 1}
    norms = [node for node in model.graph.node if node.op_type == "GroupNormalization"]
    # 1 is float32: what statistics are computed in
    assert [a.i for node in norms for a in node.attribute if a.name == "stash_type"] == [1, 1]
    x, t, condition = inputs(2)
    feed = {"x": x, "t": t, **condition}
    reference = expected(Small(), x, t, **condition)
    if precision == "fp16":
        got, tolerance = run(path, feed), FLOAT16
    else:  # ONNX Runtime has no such kernels for the CPU
        evaluator = onnx.reference.ReferenceEvaluator(str(path))
        (result,) = evaluator.run(None, {k: v.numpy() for k, v in feed.items()})
        got, tolerance = torch.from_numpy(result.astype("float32")), BFLOAT16
    error = float((got.double() - reference).abs().max())
    assert FLOAT32 < error < tolerance


def test_a_wrong_file_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_graph._group_norm_silu

    def without_shift(*args: Any) -> Tensor:
        x, weight, bias, groups, eps, scale, _, *rest = args
        return right(x, weight, bias, groups, eps, scale, None, *rest)

    monkeypatch.setattr(onnx_graph, "_group_norm_silu", without_shift)
    with pytest.raises(ValueError, match="differs from the network by"):
        export(tmp_path / "wrong.onnx", verify=True)
    assert not list(tmp_path.iterdir())


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    model = Small().half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, t, condition = inputs(2)
    example = (x, t, {**condition, "strength": 0.5})
    made = export(tmp_path / "kept.onnx", model, example_inputs=example, verify=True)
    assert model.training
    assert model.dropout.training
    assert all(p.requires_grad and p.dtype is torch.float16 for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    # float32 is what was asked for, dropout is off, and the constant is in the file
    assert made.metadata.precision == "fp32"
    assert list(made.inputs) == ["x", "t", "labels"]
    got = run(made.path, {"x": x, "t": t, **condition}).double()
    reference = expected(model, x, t, **condition, strength=0.5)
    torch.testing.assert_close(got, reference, atol=FLOAT32, rtol=0)


def test_what_is_exported_of_an_optimised_network() -> None:
    x, t, condition = inputs()
    model = Small()
    source = describe(Optimized(model, None, (), 8), (x, t, condition), None)
    assert source.model is model


def test_a_dynamic_size(tmp_path: Path) -> None:
    made = export(tmp_path / "sizes.onnx", dynamic_size=True)
    assert made.inputs["x"] == ("batch", 2, "rows", "columns")
    x, t, condition = inputs(3, side=9)
    x = x[..., :5]
    check(made.path, Small(), x, t, condition)
    got = sf.OnnxDenoiser(made.path)(x, t, **condition)
    assert torch.equal(got, run(made.path, {"x": x, "t": t, **condition}))


@pytest.mark.usefixtures("once")
def test_a_branch_on_the_batch_must_not_matter(tmp_path: Path) -> None:
    batch = f"1:3:{LARGE}"
    harmless = Small(branch=lambda h: h.contiguous())
    made = export(tmp_path / "branch.onnx", harmless, batch=batch, verify=True)
    assert f"batch 1 and {LARGE}" in made.verified
    with pytest.raises(CannotExport, match="asks for its batch size: give verify=True"):
        export(tmp_path / "branch.onnx", harmless, batch=batch, verify=False)
    doubling = Small(branch=lambda h: 2 * h)
    with pytest.raises(ValueError, match=rf"differs from the network by .* batch {LARGE}"):
        export(tmp_path / "no.onnx", doubling, batch=batch, verify=True)
    assert not (tmp_path / "no.onnx").exists()


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Graphs are built once, and hardly any weight is small."""
    monkeypatch.setattr(onnx_file, "build", build_once)
    monkeypatch.setattr(onnx_write, "_SMALL", 100)
    return monkeypatch


ONE, OTHER = Small(), Small()
with torch.no_grad():
    OTHER.conv_in.weight.mul_(2)


def test_weights_in_a_file_of_their_own(tmp_path: Path, once: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.onnx"
    first = export(path, ONE, external_data=True, verify=True)
    assert "max abs" in first.verified
    assert first.data is not None
    assert set(tmp_path.iterdir()) == {path, first.data}
    onnx.checker.check_model(path, full_check=True)
    assert first.data.stat().st_size > 4 * ONE.conv_in.weight.numel()
    check(path, ONE, *inputs(2))
    # other weights under the same name: the old pair is there until the new one is
    with once.context() as full:
        fail_on(full, path)
        with pytest.raises(OSError, match="No space left") as caught:
            export(path, OTHER, external_data=True)
    assert caught.value.filename == str(path)
    assert set(tmp_path.iterdir()) == {path, first.data}
    check(path, ONE, *inputs(2))
    second = export(path, OTHER, external_data=True)
    assert second.data is not None
    assert second.data != first.data
    assert set(tmp_path.iterdir()) == {path, second.data}
    check(path, OTHER, *inputs(2))
    # and a model with its weights inside again
    assert export(path, ONE).data is None
    assert set(tmp_path.iterdir()) == {path}
    check(path, ONE, *inputs(2))


def test_above_the_limit_weights_go_to_their_own_file(
    tmp_path: Path, once: pytest.MonkeyPatch
) -> None:
    once.setattr(onnx_write, "PROTOBUF_LIMIT", 500)
    assert export(tmp_path / "limit.onnx", ONE).data is not None
    with pytest.raises(ValueError, match="do not fit into one ONNX file; accepted: external_data="):
        export(tmp_path / "forced.onnx", ONE, external_data=False)
    assert not (tmp_path / "forced.onnx").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, once: pytest.MonkeyPatch) -> None:
    fail_on(once, tmp_path / "full.onnx")
    for outside in (False, True):
        with pytest.raises(OSError, match="No space left"):
            export(tmp_path / "full.onnx", ONE, external_data=outside)
        assert not list(tmp_path.iterdir())


def fail_on(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Renaming to ``path`` fails as on a full disk."""
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(writing.os, "replace", full)


class Undecided(nn.Module):
    """Decides by a value."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


X, T, CONDITION = inputs()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"opset": 17}, ValueError, "opset must be in 18 .. 23 for fp32; got 17"),
        ({"opset": 99}, ValueError, "opset must be in 18 .. 23 for fp32; got 99"),
        ({"opset": True}, TypeError, "opset must be an int or None; got bool True"),
        ({"opset": 20, "precision": "fp16"}, ValueError, "in 21 .. 23 for fp16; got 20"),
        ({"opset": 21, "precision": "bf16"}, ValueError, "in 22 .. 23 for bf16; got 21"),
        ({"precision": "int8"}, ValueError, "one of fp32, fp16, bf16; got 'int8'"),
        ({"batch": "8:1:4"}, ValueError, "1 <= MIN <= OPT <= MAX <= 2147483647; got 8:1:4"),
        ({"batch": "many"}, ValueError, "batch must be '1:8:64' .* got 'many'"),
        ({"prediction_type": "noise"}, ValueError, "got 'noise'"),
        ({"schedule": "linear"}, TypeError, "schedule must be a Schedule"),
        ({"example_inputs": (X,)}, TypeError, r"must be \(x, t\) or"),
        ({"example_inputs": (X, T.float())}, TypeError, "t must be int64"),
        ({"example_inputs": (X, T, {"labels": [1]})}, TypeError, "plain constant; got list"),
        ({"example_inputs": (X, T, {"labels": T.repeat(5)})}, ValueError, "one entry per sample"),
        ({"example_inputs": None}, ValueError, "give example_inputs="),
        ({"model": Undecided(), "example_inputs": (X, T)}, CannotExport, "torch.export refuses"),
        ({"model": "digits"}, TypeError, "model must be an nn.Module or a Checkpoint"),
        ({"model": network()}, ValueError, "channels|x has shape"),
    ],
)
def test_bad_input(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        export(tmp_path / "bad.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export(tmp_path / "no" / "x.onnx")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        export(tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_packages_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        sf.BackendUnavailable, match=rf"{package}.* `pip install 'stepfuse\[onnx\]'`"
    ):
        export(tmp_path / "x.onnx")
