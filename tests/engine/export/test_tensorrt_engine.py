"""Building engines for real, which TensorRT-RTX does without a GPU."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.engine.export.export_case import BATCH, exported

import stepfuse as sf
from stepfuse.engine.export.to_tensorrt import engine as tensorrt_engine
from stepfuse.engine.export.to_tensorrt.engine import BuildFailed
from stepfuse.engine.export.to_tensorrt.engine_file import read_engine, read_info
from stepfuse.engine.export.to_tensorrt.library import find_library
from stepfuse.kernels.backends import BackendUnavailable

try:
    LIBRARY = find_library("tensorrt_rtx")
except BackendUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

onnx = pytest.importorskip("onnx")


def build(path: Path, target: Path, **options: Any) -> Any:
    """With TensorRT-RTX, whatever else is installed."""
    return sf.export.tensorrt(path, target, library="tensorrt_rtx", **options)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A convolution and a bias: builds in a tenth of a second."""
    return save_graph(tmp_path / "small.onnx", ["Relu"])


def save_graph(path: Path, operators: list[str], shape: tuple[Any, ...] = ("n", 2, 4, 4)) -> Path:
    """x -> Conv -> operators -> y."""
    helper, kinds = onnx.helper, onnx.TensorProto
    weight = helper.make_tensor("w", kinds.FLOAT, (2, 2, 1, 1), [1.0, 2.0, 3.0, 4.0])
    nodes = [helper.make_node("Conv", ["x", "w"], ["v0"])]
    for index, operator in enumerate(operators):
        nodes.append(helper.make_node(operator, [f"v{index}"], [f"v{index + 1}"], name=operator))
    output = helper.make_tensor_value_info(f"v{len(operators)}", kinds.FLOAT, None)
    inputs = [helper.make_tensor_value_info("x", kinds.FLOAT, shape)]
    graph = helper.make_graph(nodes, "small", inputs, [output], [weight])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_network_becomes_an_engine(precision: str, tmp_path: Path) -> None:
    target = tmp_path / "unet.engine"
    info = build(
        exported(precision), target, precision=precision, batch=BATCH, compute_capability="sm_89"
    )
    assert (info.library, info.library_version) == ("tensorrt_rtx", LIBRARY.version)
    assert (info.precision, str(info.batch)) == (precision, BATCH)
    assert info.compute_capabilities == ("sm_89",)
    assert [(spec.name, spec.shape, spec.dtype) for spec in info.inputs] == [
        ("x", (-1, 1, 8, 8), "float32"),
        ("t", (-1,), "int64"),
        ("labels", (-1,), "int64"),
    ]
    assert [(spec.shape, spec.dtype) for spec in info.outputs] == [((-1, 1, 8, 8), "float32")]
    assert sf.export.Metadata.from_strings(info.metadata) == sf.export.read_metadata(
        exported(precision)
    )
    again, plan = read_engine(target)
    assert again == info == read_info(target)
    assert len(plan) > 10_000
    # the builder merges norms, modulation and activation into a few kernels
    graph = onnx.load(exported(precision)).graph
    norms = [n.name for n in graph.node if n.op_type == "GroupNormalization"]
    fused = [layer for layer in info.layers if len(layer.nodes) > 2]
    assert norms
    assert fused
    assert len(info.layers) < len(graph.node)


def test_another_type_than_the_file_has(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ValueError, match=r"holds fp32 weights, .* got precision='fp16'"):
        build(small, tmp_path / "a.engine", precision="fp16")
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, bf16; got 'fp8'"):
        build(small, tmp_path / "a.engine", precision="fp8")
    with pytest.raises(ValueError, match="strongly_typed=False with fp16 needs TensorRT 10"):
        build(small, tmp_path / "a.engine", precision="fp16", strongly_typed=False)
    assert not list(tmp_path.glob("*.engine"))


def test_compute_capabilities(tmp_path: Path, small: Path) -> None:
    info = build(small, tmp_path / "a.engine", compute_capability=["sm_86", "8.9", "SM120"])
    assert info.compute_capabilities == ("sm_86", "sm_89", "sm_120")
    with pytest.raises(ValueError, match=r"must be of sm_75, .*got 'sm_90'"):
        build(small, tmp_path / "b.engine", compute_capability="sm_90")
    with pytest.raises(ValueError, match="names one twice"):
        build(small, tmp_path / "b.engine", compute_capability="sm_89,8.9")
    assert not (tmp_path / "b.engine").exists()


def test_the_builder_says_what_it_lacks(tmp_path: Path) -> None:
    # Turing has no bfloat16
    with pytest.raises(BuildFailed, match=r"cannot build this network: .*sm75.*b16"):
        build(exported("bf16"), tmp_path / "a.engine", compute_capability="sm_75", batch=BATCH)
    unknown = save_graph(tmp_path / "unknown.onnx", ["Relu", "NonMaxSuppressor"])
    with pytest.raises(BuildFailed, match=r"node 2 'NonMaxSuppressor' \(NonMaxSuppressor\): "):
        build(unknown, tmp_path / "a.engine")
    assert not (tmp_path / "a.engine").exists()


def test_profiles(tmp_path: Path, small: Path) -> None:
    for text in ("8:4:16", "0:1:2", "1:2", "one", "1:8:64:128", "-1"):
        with pytest.raises(ValueError, match=r"batch must .*; got "):
            build(small, tmp_path / "a.engine", batch=text)
    assert str(build(small, tmp_path / "a.engine", batch=3).batch) == "3:3:3"
    fixed = save_graph(tmp_path / "fixed.onnx", ["Relu"], shape=(2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"fixed shape \(2, 2, 4, 4\); accepted: batch=2"):
        build(fixed, tmp_path / "b.engine", batch="1:2:4")
    assert build(fixed, tmp_path / "b.engine", batch=2).inputs[0].shape == (2, 2, 4, 4)
    wide = save_graph(tmp_path / "wide.onnx", ["Relu"], shape=("n", 2, "h", 4))
    with pytest.raises(ValueError, match=r"input 'x' has shape .* a batch as the only axis"):
        build(wide, tmp_path / "c.engine")


def test_settings_reach_the_builder(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = LIBRARY.module
    seen = []
    original = tensorrt_engine._build

    def spy(library: Any, builder: Any, network: Any, config: Any, *rest: Any) -> bytes:
        limit = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        seen.append((config.get_flag(trt.BuilderFlag.TF32), limit))
        return original(library, builder, network, config, *rest)

    monkeypatch.setattr(tensorrt_engine, "_build", spy)
    build(small, tmp_path / "a.engine")
    build(small, tmp_path / "a.engine", tf32=True, workspace=2**30)
    assert seen[0][0] is False
    assert seen[0][1] > 2**30
    assert seen[1] == (True, 2**30)
    with pytest.raises(BuildFailed, match="within workspace limit"):
        build(small, tmp_path / "b.engine", workspace=1024)


def test_the_timing_cache_is_written_and_read(tmp_path: Path, small: Path) -> None:
    cache = tmp_path / "times"
    build(small, tmp_path / "a.engine", timing_cache=cache)
    first = cache.read_bytes()
    assert first
    build(small, tmp_path / "b.engine", timing_cache=cache)
    assert cache.read_bytes() == first
    with pytest.raises(OSError, match="does not exist"):
        build(small, tmp_path / "c.engine", timing_cache=tmp_path / "no" / "times")


def test_files_that_are_no_network(tmp_path: Path, small: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build(tmp_path / "missing.onnx", tmp_path / "a.engine")
    (tmp_path / "text.onnx").write_text("not a network at all")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(small.read_bytes()[:-40])
    for path in (tmp_path / "text.onnx", cut):
        with pytest.raises(ValueError, match="is truncated or no "):
            build(path, tmp_path / "a.engine")
    with pytest.raises(OSError, match="does not exist"):
        build(small, tmp_path / "no" / "a.engine")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives while the library is in the middle of its work."""
    original = tensorrt_engine.progress_monitor

    def with_signal(library: Any, advance: Any) -> Any:
        def during(phase: str, steps: int) -> bool:
            if steps < 0:
                os.kill(os.getpid(), signal.SIGINT)
            return bool(advance(phase, steps))

        return original(library, during)

    monkeypatch.setattr(tensorrt_engine, "progress_monitor", with_signal)


@pytest.mark.usefixtures("interrupted", "ctrl_c")
def test_ctrl_c_leaves_nothing(tmp_path: Path, small: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(small, tmp_path / "a.engine")
    assert os.listdir(tmp_path) == ["small.onnx"]
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread(tmp_path: Path, small: Path) -> None:
    # where signals cannot be handled
    thread = threading.Thread(target=build, args=(small, tmp_path / "a.engine"))
    thread.start()
    thread.join()
    assert read_info(tmp_path / "a.engine").precision == "fp32"
