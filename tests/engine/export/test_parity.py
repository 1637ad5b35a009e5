"""check: right files pass, planted faults are caught and the layer is named."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.export.export_case import (
    CLASSES,
    CONFIG,
    SCHEDULE,
    SHAPE,
    altered,
    exported,
    network,
)
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.parity.compare import TOLERANCES, Deviation, Tolerance, psnr
from stepfuse.engine.export.parity.inputs import batch_sizes, timestep_bins
from stepfuse.engine.export.parity.onnx_nodes import OnnxProbe
from stepfuse.engine.networks.unet import UNet

needs_onnx = pytest.mark.usefixtures("onnx_packages")


@pytest.fixture
def onnx_packages() -> None:
    """Skips where they are missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def check(candidate: Any, **options: Any) -> Any:
    """With few bins and no images, unless asked for."""
    settings = {"bins": 4, "steps": None, "sample_shape": SHAPE, "schedule": SCHEDULE, **options}
    return sf.export.check(network(), candidate, **settings)


# numpy in float64, sample by sample
def test_deviations_are_those_of_the_definitions() -> None:
    c, r = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    found = Deviation.of(c, r)
    a, b = c.double().numpy().reshape(3, -1), r.double().numpy().reshape(3, -1)
    norm = np.linalg.norm
    cosines = [x @ y / norm(x) / norm(y) for x, y in zip(a, b, strict=True)]
    errors = [norm(x - y) / norm(y) for x, y in zip(a, b, strict=True)]
    assert found.max_abs == pytest.approx(abs(a - b).max())
    assert found.relative_l2 == pytest.approx(max(errors))
    assert found.cosine == pytest.approx(min(cosines))
    assert Deviation.of(r, r) == Deviation(0.0, 0.0, pytest.approx(1.0))


def test_deviations_of_what_is_not_a_number() -> None:
    r = torch.ones(2, 4)
    for bad in (math.nan, math.inf):
        c = r.clone()
        c[1, 2] = bad
        assert Deviation.of(c, r).relative_l2 == math.inf
        assert psnr(c, r) == -math.inf
    zero = torch.zeros(1, 4)
    assert Deviation.of(zero, zero) == Deviation(0.0, 0.0, 1.0)
    assert psnr(r, r) == math.inf
    assert psnr(r, r + 0.02) == pytest.approx(40, abs=1e-3)


def test_batch_sizes_and_bins() -> None:
    assert batch_sizes(BatchProfile(1, 8, 64)) == [1, 3, 8, 16]
    assert batch_sizes(BatchProfile(5, 5, 5)) == [5]
    assert batch_sizes(BatchProfile(2, 4, 7)) == [2, 3, 4, 7]
    assert batch_sizes(BatchProfile(20, 30, 40)) == [20]
    parts = timestep_bins(1000, 10)
    assert (parts[0], parts[-1], len(parts)) == ((0, 99), (900, 999), 10)
    assert [t for a, b in timestep_bins(7, 3) for t in range(a, b + 1)] == list(range(7))
    assert timestep_bins(2, 10) == [(0, 0), (1, 1)]


@needs_onnx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_right_file_passes(precision: str) -> None:
    report = check(exported(precision), steps=10, images=2)
    assert report.passed, report.failures
    assert (report.precision, report.emulated) == (precision, precision != "fp32")
    # not by being lenient: the tolerance of the next finer type is missed
    finer = {"fp16": "fp32", "bf16": "fp16"}.get(precision)
    assert finer is None or report.worst.relative_l2 > TOLERANCES[finer].relative_l2
    assert {case.batch for case in report.cases} == {1, 2, 3, 4}
    assert {case.inputs for case in report.cases} == {"random", "real"}
    assert {case.timesteps for case in report.cases} == {(0, 24), (25, 49), (50, 74), (75, 99)}
    assert len(report.psnr) == 2
    assert report.layers == ()


FAULTS = [
    ("conv_in.weight", "conv_in"),
    ("down.0.block.conv1.weight", "down.0.block.conv1"),
    ("middle.0.block.norm2.weight", "middle.0.block.norm2"),
    ("middle.0.attention.qkv.bias", "middle.0.attention.qkv"),
    ("class_embedding.weight", "class_embedding"),
    ("time_embedding.2.weight", "time_embedding.2"),
    ("up.0.block.shortcut.bias", "up.0.block.shortcut"),
    ("up.1.block.projection.bias", "up.1.block.projection"),
    ("norm_out.bias", "norm_out"),
    ("conv_out.weight", "conv_out"),
]


@needs_onnx
@pytest.mark.parametrize(("weight", "layer"), FAULTS, ids=[layer for _, layer in FAULTS])
def test_a_planted_fault_is_caught_and_named(weight: str, layer: str, tmp_path: Path) -> None:
    report = check(altered(exported(), tmp_path / "wrong.onnx", weight, 0.05), bins=2, batch="2")
    assert not report.passed
    assert report.worst_layer == layer
    # the other layers add nothing but rounding
    assert report.layers[0].local > 100 * report.layers[1].local
    assert any(line.startswith(f"worst layers: {layer} (adds ") for line in report.summary())


@needs_onnx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_fault_in_half_precision(precision: str, tmp_path: Path) -> None:
    weight = "up.1.block.conv1.weight"
    wrong = altered(exported(precision), tmp_path / "wrong.onnx", weight, 0.5)
    report = check(wrong, bins=2, batch="2")
    assert report.worst_layer == "up.1.block.conv1"
    assert report.layers[0].local > 10 * report.layers[1].local


@needs_onnx
def test_layers_are_found_by_their_weights_too(tmp_path: Path) -> None:
    import onnx

    wrong = altered(exported(), tmp_path / "wrong.onnx", "down.0.block.conv2.weight", 0.05)
    model = onnx.load(wrong)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, wrong)
    assert check(wrong, bins=2, batch="2").worst_layer == "down.0.block.conv2"


@needs_onnx
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_in_a_second_file(precision: str, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "split.onnx"
    onnx.save(
        onnx.load(exported(precision)),
        path,
        save_as_external_data=True,
        location="split.data",
        size_threshold=256,
    )
    assert (tmp_path / "split.data").stat().st_size > 10_000
    whole, split = (check(file, bins=2, batch="2") for file in (exported(precision), path))
    assert split.cases == whole.cases
    # the search for the layer too
    assert check(path, bins=2, batch="2", tolerance=1e-12).worst_layer is not None


@needs_onnx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_rounded_after_every_operation(precision: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    probe = OnnxProbe(exported(precision))
    layers = ["conv_in", "down.0.block.norm1", "middle.0.attention.qkv", "up.1.block.conv2"]
    names = probe.layer_values(layers)
    inputs = {
        "x": torch.randn(2, *SHAPE),
        "t": torch.tensor([3, 60]),
        "labels": torch.tensor([0, CLASSES]),
    }
    for layer, name in names.items():
        value = probe.values([name], inputs)[name]
        assert torch.equal(value.to(dtype).float(), value), layer
    assert set(names) == set(layers)


def test_a_module_is_compared_layer_by_layer_too() -> None:
    wrong = _copied()
    with torch.no_grad():
        wrong.get_submodule("up.0.block.conv2").weight.mul_(1.01)
    report = check(wrong)
    assert report.worst_layer == "up.0.block.conv2"
    assert check(_copied()).passed


def _copied() -> nn.Module:
    return copy.deepcopy(network())


def test_a_function_is_compared_without_layers() -> None:
    def wrong(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = network()(x, t, labels)
        # wrong at small t only: a check at large t would not see it
        return torch.where(t[:, None, None, None] < 20, 1.001 * found, found)

    report = check(wrong, steps=4, images=1)
    assert not report.passed
    assert report.worst_layer is None
    bad = {case.timesteps for case in report.cases if case.against_float64.relative_l2 > 1e-4}
    assert bad == {(0, 24)}


def test_a_fault_in_one_batch_size_or_one_class() -> None:
    def odd(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = network()(x, t, labels)
        return found * (1.01 if len(x) == 3 else 1.0)

    report = check(odd)
    assert {c.batch for c in report.cases if c.against_float64.relative_l2 > 1e-4} == {3}

    def null(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = network()(x, t, labels)
        return torch.where((labels == CLASSES)[:, None, None, None], found.nan_to_num(1) + 1, found)

    assert not check(null).passed


def test_a_learned_variance_and_no_classes() -> None:
    config = replace(CONFIG, num_classes=None, learned_variance=True, in_channels=2)
    model = UNet(config).eval()
    torch.nn.init.normal_(model.conv_out.weight, std=0.2)
    options: Any = {"sample_shape": (2, 8, 8), "schedule": SCHEDULE, "bins": 2, "images": 1}
    same = sf.export.check(model, copy.deepcopy(model), steps=3, **options)
    assert same.passed
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv_out.bias[3] += 0.1  # of the variance: no image shows it
    report = sf.export.check(model, other, steps=3, **options)
    assert report.psnr == same.psnr
    assert report.worst_layer == "conv_out"


def test_not_a_number_fails() -> None:
    def broken(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.full_like(x, math.nan)

    report = check(broken, steps=2, images=1)
    assert not report.passed
    assert report.psnr == (-math.inf,)
    assert json.loads(report.to_json())["psnr"] == ["-inf"]


def test_the_reference_is_left_alone() -> None:
    model = _copied()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    check(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tolerances_and_reports() -> None:
    strict = check(_copied(), tolerance=1e-12)
    assert not strict.passed
    assert "above 1e-12" in strict.failures[0]
    report = check(_copied(), steps=3, images=1, tolerance=Tolerance(1e-3, 30.0))
    assert report.passed
    markdown = report.markdown()
    assert markdown.count("\n| ") == 8
    assert markdown.rstrip().endswith("- passed")
    values = json.loads(report.to_json())
    assert values["passed"] is True
    assert len(values["cases"]) == 2 * 4 * 4
    assert report.table().row_count == 8
    assert replace(report, psnr=(10.0,)).failures == ["images at 10.0 dB, below 30 dB"]
    # the same seed gives the same numbers
    assert check(_copied(), seed=3) == check(_copied(), seed=3)


BAD = [
    ({"bins": 0}, r"bins must be in 1 \.\. 2147483647; got 0"),
    ({"images": 0}, r"images must be in 1 \.\. 2147483647; got 0"),
    ({"steps": 0}, r"steps must be in 1 \.\. 2147483647; got 0"),
    ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16; got 'fp8'"),
    ({"tolerance": -1.0}, r"tolerance must be a positive number; got -1\.0"),
    ({"batch": "4:2:1"}, "batch must be MIN:OPT:MAX .* got 4:2:1"),
    ({"schedule": None}, "give schedule="),
    ({"sample_shape": None}, "sample_shape"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[next(iter(o)) for o, _ in BAD])
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(lambda x, t, labels: x, **options)


@needs_onnx
def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.onnx is not there"):
        check(tmp_path / "missing.onnx")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(exported().read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.onnx is truncated or no ONNX file"):
        check(cut)
    with pytest.raises(
        TypeError, match=r"must be the path of an \.onnx file, or callable .* got int 3"
    ):
        check(3)
