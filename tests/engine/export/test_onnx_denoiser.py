"""OnnxDenoiser: the same pictures as the engine, no copies, and errors that say what is wrong."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.export.export_case import CLASSES, SIDE, exported, network
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.export.parity.compare import psnr
from stepfuse.engine.export.to_onnx import runtime

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

FLOAT32 = 2e-5  # of outputs of order 1..10: another order of summation through a small network
PICTURE = 1e-3  # of pixels in -1..1: the same, carried through 50 steps
DECIBEL = 60.0


@pytest.fixture(scope="module")
def denoiser() -> sf.OnnxDenoiser:
    """Of the tiny network, for batches of 1 .. 4."""
    return sf.OnnxDenoiser(exported())


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count, 1, SIDE, SIDE)
    return x, torch.arange(count) * 20, torch.arange(count) % (CLASSES + 1)


@pytest.mark.parametrize("guided", [False, True])
def test_digits_are_the_same_pictures(
    digits: sf.Checkpoint, digits_onnx: Path, guided: bool
) -> None:
    denoiser = sf.OnnxDenoiser(digits_onnx)
    settings: dict[str, Any] = {
        "prediction_type": denoiser.prediction_type,
        "guidance": sf.CFG(3.0, unconditional={"labels": None}) if guided else None,
        "steps": 20 if guided else 50,
    }
    ours = sf.Sampler(digits.model, digits.schedule, **settings)
    theirs = sf.Sampler(denoiser, denoiser.schedule, **settings)
    shape, condition = (3, *denoiser.sample_shape), {"labels": torch.tensor([3, 7, 0])}
    expected = ours.sample(shape, seed=5, condition=condition)
    got = theirs.sample(shape, seed=5, condition=condition)
    torch.testing.assert_close(got, expected, atol=PICTURE, rtol=0)
    assert psnr(got, expected) > DECIBEL
    assert expected.std() > 0.3
    # the call is an operator, which the sampler records: 50 replays of one recording
    stats = theirs.stats()
    assert (stats["captures"], stats["eager_steps"]) == (1, 0)
    assert "a recording of its operations" in theirs.explain()


def test_views_with_a_pending_negation(denoiser: sf.OnnxDenoiser) -> None:
    x, t, labels = inputs(2)
    expected = denoiser(x, t, labels=labels)
    view = torch._neg_view(-x)
    assert torch.equal(denoiser(view, t, labels=labels), expected)
    given = [torch._neg_view(-t), torch._neg_view(-labels)]
    assert torch.equal(denoiser(view, given[0], labels=given[1]), expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_evaluation(denoiser: sf.OnnxDenoiser, count: int) -> None:
    x, t, labels = inputs(count)
    with torch.no_grad():
        expected, null = network()(x, t, labels), network()(x, t, None)
    torch.testing.assert_close(denoiser(x, t, labels=labels), expected, atol=FLOAT32, rtol=0)
    for condition in ({}, {"labels": None}):
        torch.testing.assert_close(denoiser(x, t, **condition), null, atol=FLOAT32, rtol=0)
    # another layout and other dtypes, which cost a copy
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    for other, when in ((wide, t), (x.double(), t.to(torch.int32))):
        got = denoiser(other, when, labels=labels)
        torch.testing.assert_close(got, expected, atol=FLOAT32, rtol=0)


class Spy:
    """A session whose bindings write down which memory is lent."""

    def __init__(self, session: Any) -> None:
        self.session, self.lent = session, dict[str, int]()

    def io_binding(self) -> Any:
        self.binding = self.session.io_binding()
        return self

    def bind_input(self, name: str, *arguments: Any) -> None:
        self.lent[name] = arguments[-1]
        self.binding.bind_input(name, *arguments)

    def bind_output(self, name: str, *arguments: Any) -> None:
        self.lent[name] = arguments[-1]
        self.binding.bind_output(name, *arguments)

    def run_with_iobinding(self, _: Any) -> None:
        self.session.run_with_iobinding(self.binding)


def test_memory_is_lent_and_not_copied(
    denoiser: sf.OnnxDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(denoiser._session)
    monkeypatch.setattr(denoiser, "_session", spy)
    x, t, labels = inputs(2)
    output = denoiser(x, t, labels=labels)
    given = {"x": x, "t": t, "labels": labels, "output": output}
    assert spy.lent == {name: value.data_ptr() for name, value in given.items()}


def test_it_says_what_the_file_says(denoiser: sf.OnnxDenoiser) -> None:
    assert denoiser.schedule == sf.Schedule.linear(100)
    assert (denoiser.prediction_type, denoiser.variance_type) == ("epsilon", "fixed_small")
    assert denoiser.sample_shape == (1, SIDE, SIDE)
    assert denoiser.providers == ["CPUExecutionProvider"]


def test_copies_run(denoiser: sf.OnnxDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, labels = inputs(2)
    expected = denoiser(x, t, labels=labels)
    monkeypatch.chdir(denoiser.path.parent)
    here = sf.OnnxDenoiser(denoiser.path.name)
    monkeypatch.chdir("/")
    for one in (denoiser, here):
        for other in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert torch.equal(other(x, t, labels=labels), expected)


def test_labels_out_of_range_are_refused_before_the_steps(denoiser: sf.OnnxDenoiser) -> None:
    sampler = sf.Sampler(denoiser, denoiser.schedule, steps=2)
    known = denoiser.metadata.num_classes
    with pytest.raises(ValueError, match=f"label {known + 1} is out of range; accepted: 0"):
        sampler.sample((2, *denoiser.sample_shape), condition={"labels": [0, known + 1]})


X, T, LABELS = inputs(2)


@pytest.mark.parametrize(
    ("x", "t", "condition", "error", "words"),
    [
        (X[:0], T[:0], {}, ValueError, "batch 0 is outside the profile; accepted: 1 .. 4"),
        (torch.zeros(5, 1, 8, 8), T, {}, ValueError, "batch 5 is outside the profile"),
        (
            X[..., :4],
            T,
            {},
            ValueError,
            r"x has shape \(2, 1, 8, 4\); accepted: \[batch, 1, 8, 8\]",
        ),
        (X[0], T, {}, ValueError, "x has shape"),
        (X, T[:1], {}, ValueError, "t has 1 entries; accepted: 2, as x has"),
        (X, T.float(), {}, TypeError, "t has dtype torch.float32; accepted: torch.int64"),
        (X.long(), T, {}, TypeError, "x has dtype torch.int64; accepted: torch.float32"),
        (X, T, {"text": X}, ValueError, "no input 'text'; accepted: labels"),
        (X, T, {"labels": 3}, ValueError, "needs the tensor 'labels'; got int 3"),
        (X, T, {"labels": LABELS[:, None]}, ValueError, "labels has shape"),
        (
            X,
            T,
            {"labels": LABELS + 9},
            RuntimeError,
            "ONNX Runtime cannot run .*out of data bounds",
        ),
    ],
)
def test_bad_calls(
    denoiser: sf.OnnxDenoiser,
    x: Tensor,
    t: Tensor,
    condition: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        denoiser(x, t, **condition)


def test_bad_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = exported().read_bytes()
    cases = {
        "cut.onnx": content[: len(content) // 2],
        "empty.onnx": b"",
        "text.onnx": b"this is no model" * 99,
    }
    for name, bad in cases.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(ValueError, match=rf"{name} is truncated or no ONNX file"):
            sf.OnnxDenoiser(tmp_path / name)
    with pytest.raises(ValueError, match=r"none\.onnx is not there"):
        sf.OnnxDenoiser(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="is a folder; accepted: an ONNX file"):
        sf.OnnxDenoiser(tmp_path)
    with pytest.raises(ValueError, match="threads must be at least 1; got 0"):
        sf.OnnxDenoiser(exported(), threads=0)
    # what ONNX Runtime has to say is in the exception, not on the terminal
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("providers", "words"),
    [
        (["CUDAExecutionProvider"], "is not in the onnxruntime .* install onnxruntime-gpu"),
        ([("OpenVINOExecutionProvider", {})], "install onnxruntime-openvino"),
        (["AbacusExecutionProvider"], "knows no provider 'AbacusExecutionProvider'; here it has"),
    ],
)
def test_providers_that_are_not_there(providers: list[Any], words: str) -> None:
    asked = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if asked in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {asked}")
    with pytest.raises(sf.BackendUnavailable, match=words):
        sf.OnnxDenoiser(exported(), providers=providers)


def test_providers_are_a_list() -> None:
    for wrong in ("CPUExecutionProvider", []):
        with pytest.raises(ValueError, match="providers must be a list"):
            sf.OnnxDenoiser(exported(), providers=wrong)  # type: ignore[arg-type]


def test_a_precision_without_kernels() -> None:
    with pytest.raises(
        sf.BackendUnavailable, match=r"cannot run .*Could not find an implementation"
    ):
        sf.OnnxDenoiser(exported("bf16"))


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(sf.BackendUnavailable, match=r"pip install 'stepfuse\[onnx\]'"):
        sf.OnnxDenoiser(exported())


def test_files_of_other_programs(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto
    ports = [
        helper.make_tensor_value_info("noisy", kind.FLOAT, ["n", 1, 2, 2]),
        helper.make_tensor_value_info("when", kind.INT64, ["n"]),
        helper.make_tensor_value_info("y", kind.FLOAT, ["n", 1, 2, 2]),
    ]
    nodes = [helper.make_node("Neg", ["noisy"], ["y"]), helper.make_node("Neg", ["when"], ["_"])]
    path = tmp_path / "other.onnx"
    for count in (2, 1):
        graph = helper.make_graph(nodes[:count], "g", ports[:count], ports[2:])
        opsets = [helper.make_opsetid("", 21)]
        onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), path)
        if count == 1:
            with pytest.raises(ValueError, match=r"has the inputs \(noisy\); a denoiser has"):
                sf.OnnxDenoiser(path)
            continue
        denoiser = sf.OnnxDenoiser(path)
        x = torch.randn(7, 1, 2, 2)
        assert torch.equal(denoiser(x, torch.arange(7)), -x)
        assert denoiser.metadata is None
        with pytest.raises(ValueError, match="names no schedule; give it to the Sampler yourself"):
            denoiser.schedule  # noqa: B018


def test_threads_are_those_of_torch() -> None:
    threads = torch.get_num_threads()
    assert runtime.quiet_options(onnxruntime).intra_op_num_threads == threads
    assert runtime.quiet_options(onnxruntime, 3).intra_op_num_threads == 3
