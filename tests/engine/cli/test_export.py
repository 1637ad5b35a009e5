"""``stepfuse export``: files, messages and exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.cli.cli_case import process
from tests.engine.export.export_case import SIDE, altered, checkpoint, exported

import stepfuse as sf
from stepfuse.engine.cli import exporting, run
from stepfuse.engine.export.to_onnx.job import Exported
from stepfuse.engine.export.to_tensorrt import engine as tensorrt_engine
from stepfuse.engine.export.to_tensorrt import library as tensorrt_library
from stepfuse.engine.export.to_tensorrt.engine_file import read_info
from stepfuse.engine.export.to_tensorrt.library import find_library
from stepfuse.kernels.backends import BackendUnavailable

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name, reason=f"{name} is not installed")
pytestmark = pytest.mark.usefixtures("empty_folder")

try:
    find_library("tensorrt_rtx")
    NO_TENSORRT = ""
except BackendUnavailable as reason:
    NO_TENSORRT = str(reason)
needs_tensorrt = pytest.mark.skipif(bool(NO_TENSORRT), reason=NO_TENSORRT)


def export(*options: str, model: str | None = None) -> int:
    """`stepfuse export` in this process; its exit status."""
    return run(["export", "--model", model or checkpoint(), *options])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is not exported again: the file that all tests share is copied."""

    def copied(model: Any, path: Path, *, precision: str, **options: Any) -> Exported:
        path.write_bytes(exported(precision).read_bytes())
        metadata = sf.export.read_metadata(path)
        return Exported(path, None, metadata, {}, Counter(), "not asked for")

    monkeypatch.setattr(exporting, "onnx", copied)


def test_a_file_compared_and_the_report(capsys: Any) -> None:
    options = ["--batch", "1:2:3", "--check", "--report", "r.json"]
    assert export("-o", "unet.onnx", *options) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    size = rf"\d+\.\d MB, fp32, opset \d+, inputs x \[batch, 1, {SIDE}, {SIDE}\], t \[batch\]"
    assert re.match(rf"unet\.onnx: {size}, labels \[batch\]$", lines[0])
    assert lines[1].startswith("compared: ONNX Runtime ")
    assert "passed" in lines
    assert 'next: model = stepfuse.OnnxDenoiser("unet.onnx")' in out
    report = json.loads(Path("r.json").read_text())
    assert report["passed"] is True
    assert {case["batch"] for case in report["cases"]} == {1, 2, 3}
    assert sorted(os.listdir()) == ["r.json", "unet.onnx"]

    # what the file draws is what the checkpoint draws
    original, denoiser = sf.load(checkpoint()), sf.OnnxDenoiser("unet.onnx")
    condition = {"labels": torch.tensor([0, 2])}
    pictures = [
        sf.Sampler(model, denoiser.schedule, steps=5).sample(
            (2, *original.sample_shape), seed=1, condition=condition
        )
        for model in (original.model, denoiser)
    ]
    assert float((pictures[0] - pictures[1]).abs().max()) < 1e-4


@pytest.mark.usefixtures("quick")
def test_a_difference_is_an_exit_status(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = exporting.onnx

    def wrong(model: Any, path: Path, **options: Any) -> Any:
        result = copied(model, path, **options)
        altered(path, path, "up.0.block.shortcut.weight", 0.2)
        return result

    monkeypatch.setattr(exporting, "onnx", wrong)
    assert export("-o", "unet.onnx", "--batch", "2", "--check", "--report", "r.md") == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: unet\.onnx differs from the reference: relative L2 .*above.*; "
        r"worst layer up\.0\.block\.shortcut\n",
        error,
    )
    assert "worst layers: up.0.block.shortcut" in Path("r.md").read_text()


@needs_tensorrt
@pytest.mark.usefixtures("quick")
def test_an_engine_in_half_precision(capsys: Any) -> None:
    options = ["--precision", "bf16", "--tensorrt", "u.engine", "--compute-capability", "sm_89,8.6"]
    assert export("-o", "u.onnx", "--batch", "1:2:4", *options) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^u\.engine: \d+\.\d MB, tensorrt\w* \S+, bf16, batch 1:2:4, \d+ layers, "
        r"for sm_89, sm_86$",
        out,
        re.MULTILINE,
    )
    assert 'next: model = stepfuse.TensorRTDenoiser("u.engine")' in out
    info = read_info("u.engine")
    assert (info.precision, str(info.batch)) == ("bf16", "1:2:4")


def test_the_whole_loop(capsys: Any) -> None:
    options = ["--whole-loop", "--steps", "3", "--guidance", "2", "--batch", "2"]
    assert export("-o", "sampler.onnx", *options) == 0
    assert "inputs x_T [2, 1, 8, 8]" in capsys.readouterr().out
    metadata = sf.export.read_metadata("sampler.onnx")
    assert (metadata.kind, len(metadata.sampler["timesteps"])) == ("sampler", 3)
    assert metadata.sampler["guidance_scale"] == 2


@pytest.mark.usefixtures("quick")
def test_the_default_name(capsys: Any) -> None:
    assert export("--batch", "2") == 0
    assert os.listdir() == ["tiny.onnx"]
    assert "--check compares it with the original" in capsys.readouterr().out


USAGE = [
    (["-o", "a.pt"], r"--out must end in \.onnx; got 'a\.pt'"),
    (["--precision", "fp8"], "--precision must be one of fp32, fp16, bf16; got 'fp8'"),
    (["--batch", "8:4:16"], "batch must be MIN:OPT:MAX with .*; got 8:4:16"),
    (["--batch", "few"], "batch must be '1:8:64' .*; got 'few'"),
    (["--batch", "0"], "batch must be MIN:OPT:MAX with .*; got 0:0:0"),
    (["--opset", "9"], "opset must be .*; got 9"),
    (["--opset", "18", "--precision", "bf16"], "opset must be .*bf16.*; got 18"),
    (["--guidance", "2"], "--guidance 2 is part of a sampler; give --whole-loop too"),
    (["--whole-loop", "--guidance", "nan"], "--guidance must be a finite number; got nan"),
    (["--whole-loop", "--steps", "0", "--batch", "1"], r"steps must be in 1 \.\. 100 .*; got 0"),
    (["--whole-loop", "--eta", "2", "--batch", "1"], r"eta must be in \[0, 1\]; got 2.0"),
    (["--whole-loop", "--tensorrt", "a.engine"], "--tensorrt is for a network alone; .*"),
    (["--compute-capability", "sm_89"], "--compute-capability needs --tensorrt FILE; .*'sm_89'"),
    (["--timing-cache", "t"], "--timing-cache needs --tensorrt FILE; got 't'"),
    (["--tolerance", "1e-3"], "--tolerance needs --check; got '0.001'"),
    (["--check", "--tolerance", "0"], r"--tolerance must be a positive number; got 0\.0"),
    (["--check", "--report", "r.txt"], r"--report must end in \.md or \.json; got 'r\.txt'"),
    (["-o", "a.onnx", "--tensorrt", "./a.onnx"], "two files with one name; got .*"),
    (["--colour"], "No such option: --colour.*"),
    (["-o", "no/a.onnx"], "cannot write no/a.onnx: folder no does not exist"),
    (["--tensorrt", "no/a.engine"], "cannot write no/a.engine: folder no does not exist"),
    (["-o", "/proc/a.onnx"], "/proc/a.onnx: .+"),
]


@pytest.mark.parametrize(
    ("options", "line"),
    USAGE,
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_gives_one_line(options: list[str], line: str, capsys: Any) -> None:
    assert export(*options) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"error: {line}\n", captured.err)
    assert captured.out == ""
    assert os.listdir() == []


@needs_tensorrt
def test_a_gpu_that_the_library_does_not_know(capsys: Any) -> None:
    assert export("--tensorrt", "a.engine", "--compute-capability", "sm_42") == 2
    assert "compute_capability must be of sm_75, " in capsys.readouterr().err
    assert os.listdir() == []


def test_without_tensorrt(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "MODULES", {"tensorrt": ("no_such_tensorrt",)})
    tensorrt_library._import.cache_clear()
    assert export("--tensorrt", "a.engine") == 1
    tensorrt_library._import.cache_clear()
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: tensorrt is not there .*pip install 'stepfuse\[tensorrt\]'.*\n", error
    )
    assert os.listdir() == []


def test_a_missing_and_a_damaged_checkpoint(capsys: Any) -> None:
    assert export(model="nothing") == 2
    assert "unknown checkpoint 'nothing'" in capsys.readouterr().err
    Path("cut.safetensors").write_bytes(Path(checkpoint()).read_bytes()[:100])
    assert export(model="cut.safetensors") == 2
    assert "is truncated or no safetensors file" in capsys.readouterr().err
    assert os.listdir() == ["cut.safetensors"]


@needs_tensorrt
@pytest.mark.usefixtures("quick", "ctrl_c")
def test_ctrl_c_while_building(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tensorrt_engine.progress_monitor

    def with_signal(library: Any, advance: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(library, advance)

    monkeypatch.setattr(tensorrt_engine, "progress_monitor", with_signal)
    assert export("-o", "a.onnx", "--tensorrt", "a.engine") == 130
    assert capsys.readouterr().err == "error: interrupted; no file was left half-written\n"
    # the first file was finished
    assert os.listdir() == ["a.onnx"]


def test_help_teaches_and_is_quick() -> None:
    script = (
        "import sys; from stepfuse.engine.cli import run; run(['export', '--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0
    assert "--compute-capability" in found.stdout
    assert "stepfuse export --model digits --out unet.onnx --check" in found.stdout
    assert "export" in process("--help").stdout
