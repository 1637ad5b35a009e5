"""Errors of the command line: one line, an exit status, and no file left half-written.

What a process sees of its terminal, its signals and its disk runs in one of its own.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.cli.cli_case import arrays, process, sample
from tests.signalled import start
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.cli.errors import describe
from stepfuse.engine.files import writing
from stepfuse.engine.networks.unet import UNet
from stepfuse.kernels.backends import why_not

pytestmark = pytest.mark.usefixtures("empty_folder")


USAGE = [
    (["--steps", "0"], r"steps must be in 1 \.\. 100 \(num_train_timesteps\); got 0"),
    (["--steps", "101"], r"steps must be in 1 \.\. 100 \(num_train_timesteps\); got 101"),
    (["--steps", "abc"], "steps must read like '50', '10,15,20' or 'ddim50'; got 'abc'"),
    (["--steps", "1.5"], "steps must read like '50', '10,15,20' or 'ddim50'; got '1.5'"),
    (["-n", "0"], "-n must be at least 1; got 0"),
    (["-n", "many"], "Invalid value for '-n'.*'many'"),
    (["--label", "3"], "--label must be one of circle, square, 7 or none; got '3'"),
    (["--label", "-1"], "--label must be one of circle, square, 7 or none; got '-1'"),
    (["--eta", "1.5"], r"eta must be in \[0, 1\]; got 1.5"),
    (["--eta", "1", "--method", "ddpm"], "method 'ddpm' takes no eta: it must be 0; got eta=1.0"),
    (["--method", "rk4"], "method must be a Method or one of .*ddim.*; got 'rk4'"),
    (["--spacing", "odd"], "spacing must be one of leading, .*; got 'odd'"),
    (["--guidance", "inf"], "--guidance must be a finite number; got inf"),
    (["--guidance", "2", "-l", "none"], "--guidance 2 needs labels .* no label is asked for"),
    (["--backend", "fpga"], "backend must be one of auto, .*; got 'fpga'"),
    (["--optimize", "fp8"], "--optimize must be one of off, float32, bfloat16; got 'fp8'"),
    (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
    (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
    (["--first-index", "-1"], "--first-index must be at least 0; got -1"),
    (["--seed", str(2**64)], "seed must fit in 64 bits; got 18446744073709551616"),
    (["--threads", "0"], "--threads must be at least 1; got 0"),
    (["--threads", "100000"], r"--threads must be in 1 \.\. \d+; got 100000"),
    (["-n", str(10**13)], r"-n 10000000000000 cannot fit: at least 3\.2e\+06 GB are needed, .*"),
    (["-n", str(10**40)], r"-n 1(0{40}) cannot fit: .*"),
    (["--batch-size", "1e10"], "Invalid value for '--batch-size'.*'1e10'.*"),
    (["--steps", str(10**12)], r"steps must be in 1 \.\. 100 .*; got 1000000000000"),
    (["--scale", "9"], r"--scale must be in 1 \.\. 8; got 9"),
    (["--columns", "0"], "--columns must be at least 1; got 0"),
    (["-o", "a.jpg"], r"--out must end in \.png .* got 'a\.jpg'"),
    (["-o", ""], "--out must end in .* got ''"),
    (["-o", "/"], "--out must name a file or a folder; got '/'"),
    (["--model", "nothing"], r"unknown checkpoint 'nothing'; accepted: .*\.safetensors file"),
    (["--colour"], "No such option: --colour.*"),
    (["stray"], r".*unexpected extra argument.*stray.*"),
    (["-o", "missing/a.png"], "cannot write missing/a.png: folder missing does not exist"),
    (["-o", "/dev/full"], "cannot write the folder /dev/full: it is a file"),
    (["-o", "/dev/full/a.png"], "cannot write /dev/full/a.png: folder /dev/full is not a folder"),
    (["-o", "/proc/a.png"], "/proc/a.png: .+"),
    (["-o", "x" * 300 + ".png"], "x{300}.png: File name too long"),
]
FAILURES: list[tuple[list[str], str]] = []
if not torch.cuda.is_available():
    FAILURES.append((["--device", "cuda"], "--device cuda: PyTorch sees 0 CUDA devices here; .*"))


@pytest.mark.parametrize(
    ("options", "line", "status"),
    [(*case, 2) for case in USAGE] + [(*case, 1) for case in FAILURES],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_gives_one_line(
    tiny: str, options: list[str], line: str, status: int, capsys: Any
) -> None:
    assert sample(tiny, "-n", "1", *options) == status
    captured = capsys.readouterr()
    assert re.fullmatch(f"error: {line}\n", captured.err)
    assert captured.out == ""
    assert os.listdir() == []


@pytest.mark.parametrize("size", [4, 100, 5000, -1], ids="{} bytes".format)
def test_a_truncated_checkpoint(tiny: str, size: int, capsys: Any) -> None:
    Path("cut.safetensors").write_bytes(Path(tiny).read_bytes()[:size])
    assert sample("cut.safetensors") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: cut\.safetensors is truncated or no safetensors file: .*\n", error)
    assert os.listdir() == ["cut.safetensors"]


def test_labels_of_a_model_without_classes(rgb: str, capsys: Any) -> None:
    assert sample(rgb, "-n", "1", "--label", "3") == 2
    assert re.fullmatch(
        "error: --label 3: model '.*rgb.safetensors' has no classes\n", capsys.readouterr().err
    )
    assert sample(rgb, "-n", "1", "--guidance", "2") == 2
    assert "needs labels to be guided by, but the model has no classes" in capsys.readouterr().err
    assert sample(rgb, "-n", "1", "--label", "none", "-o", "a.npz") == 0
    assert set(arrays("a.npz")) == {"images", "settings"}


def test_a_backend_that_cannot_run_says_why(tiny: str, capsys: Any) -> None:
    reason = why_not("triton", "cpu")
    assert reason
    assert sample(tiny, "-n", "1", "--backend", "triton", "--device", "cpu") == 1
    assert capsys.readouterr().err == f"error: {reason}\n"


def test_samples_that_are_not_numbers(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(self: UNet, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x * float("nan")

    monkeypatch.setattr(UNet, "forward", broken)
    for out in ("a.png", "a.gif"):
        assert sample(tiny, "-n", "2", "-o", out) == 1
        error = capsys.readouterr().err
        assert error == "error: 128 of 128 values of the samples are NaN\n"
    assert os.listdir() == []


@pytest.mark.parametrize("out", ["a.png", "a.npz", "images/"])
def test_a_disk_that_is_full_leaves_nothing(
    tiny: str, out: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def half(path: Path, content: bytes) -> None:
        if not content:
            return  # the probe before sampling
        path.write_bytes(content[: len(content) // 2])
        with open("/dev/full", "wb") as full:
            full.write(content)

    monkeypatch.setattr(writing, "_write", half)
    assert sample(tiny, "-n", "2", "-o", out) == 1
    assert re.fullmatch(
        rf"error: (\S+/)?{out.rstrip('/')}: No space left on device\n", capsys.readouterr().err
    )
    assert os.listdir() == []


def test_a_disk_that_takes_a_few_bytes_only(tiny: str) -> None:
    done = process(
        "sample", "-m", tiny, "-n", "1", "--steps", "1", "-o", "a.png",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: a.png: File too large\n"
    assert os.listdir() == []


def test_ctrl_c_under_the_bar_of_a_terminal(tiny: str) -> None:
    terminal, stderr = pty.openpty()
    command = ["sample", "-m", tiny, "-n", "5000", "--batch-size", "1", "--steps", "100"]
    child = start(
        [sys.executable, "-m", "stepfuse", *command, "-o", "a.png"],
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(stderr)
    deadline = time.monotonic() + 60
    try:
        seen = b""
        # until the bar has moved: "sampling ----- 3/500000 steps"
        while not re.search(rb"[1-9]\d*/500000", seen):
            assert time.monotonic() < deadline
            seen += os.read(terminal, 4096)
        child.send_signal(signal.SIGINT)
        # reading fails where the other end is closed
        with contextlib.suppress(OSError):
            while data := os.read(terminal, 4096):
                seen += data
        assert child.wait(timeout=60) == 130
    finally:
        child.kill()
        child.wait()
        os.close(terminal)
    assert b"sampling" in seen
    assert re.search(rb"error: .*interrupted; no file was left half-written", seen)
    assert b"Traceback" not in seen
    assert os.listdir() == []


def test_debug_shows_where(tiny: str, capsys: Any) -> None:
    assert sample(tiny, "--steps", "0", "--debug") == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "timesteps.py" in error
    assert error.splitlines()[-1].startswith("error: steps must be in")


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (KeyError("x"), "KeyError: 'x' (--debug shows where)", 1),
        (RuntimeError("two\n  lines"), "RuntimeError: two lines (--debug shows where)", 1),
        (sf.BackendUnavailable("no nvcc"), "no nvcc", 1),
        (PermissionError(13, "Permission denied", "a.png"), "a.png: Permission denied", 1),
        (TypeError("got bool"), "got bool", 2),
    ],
)
def test_every_error_becomes_a_line(error: Exception, line: str, status: int) -> None:
    assert describe(error) == (line, status)
