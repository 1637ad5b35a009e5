"""What is printed is not the result: files that were written count, whatever stdout is.

And what ends a command from outside leaves nothing half done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import signalled
from tests.engine.cli.cli_case import process, sample
from tests.signalled import start

from stepfuse.engine.cli import commands, run
from stepfuse.engine.cli.errors import Problem, describe, interruptible

pytestmark = pytest.mark.usefixtures("empty_folder")
SAMPLE = ["sample", "-n", "1", "--steps", "1"]
NOTE = "note: a.png: written, but stdout takes no more: No space left on device\n"


def python(*arguments: str, stdout: Any, **variables: str) -> subprocess.CompletedProcess[Any]:
    """The command in a process of its own with this stdout."""
    return subprocess.run(
        [sys.executable, "-m", "stepfuse", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
        env={**os.environ, **variables},
    )


def test_a_full_stdout_after_the_file_was_written(tiny: str) -> None:
    with open("/dev/full", "wb") as full:
        done = python(*SAMPLE, "-m", tiny, "-o", "a.png", stdout=full)
    assert (done.returncode, done.stderr.decode()) == (0, NOTE)
    assert os.listdir() == ["a.png"]


@pytest.mark.parametrize("words", [["--version"], ["doctor"], ["sample", "--help"]])
def test_a_full_stdout_where_printing_is_all(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = python(*words, stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode() == "error: stdout takes no more: No space left on device\n"


def test_a_reader_that_has_seen_enough(tiny: str) -> None:
    for words in ([*SAMPLE, "-m", tiny, "-o", "a.png"], ["doctor"]):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = python(*words, stdout=writing)
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir() == ["a.png"]


def test_stderr_that_takes_nothing(tiny: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stepfuse", "sample", "-m", tiny, "--steps", "0"],
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=120,
        )
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_stdout_cannot_spell(tiny: str, encoding: str) -> None:
    """With bytes that are no text in UTF-8, as names in old archives have them."""
    name = "Zähler-数字-".encode() + b"\xff\xfe.png"
    done = python(
        *SAMPLE, "-m", tiny, "-o", os.fsdecode(name), stdout=subprocess.PIPE,
        PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"1 image of 8x8" in done.stdout
    assert len(os.listdir()) == 1


def test_train_names_what_it_cannot_spell() -> None:
    np.savez("a.npz", images=np.zeros((2, 8, 8), np.uint8))
    done = python(
        *["train", "a.npz", "--out", "läuft-数", "--steps", "1", "--batch-size", "1"],
        *["--sample-every", "0"], stdout=subprocess.PIPE, PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"wrote l\\xe4uft-\\u6570")
    assert (Path("läuft-数") / "model.safetensors").is_file()


def wait_for(child: subprocess.Popen[bytes], wanted: Any) -> None:
    deadline = time.monotonic() + 60
    while not wanted():
        assert child.poll() is None, child.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_training_with_its_state(number: int, status: int) -> None:
    np.savez("a.npz", images=np.zeros((2, 8, 8), np.uint8))
    child = start(
        [
            *[sys.executable, "-m", "stepfuse", "train", "a.npz", "--out", "run"],
            *["--batch-size", "1", "--save-every", "1", "--sample-every", "0", "--steps", "99999"],
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(child, Path("run/state.pt").exists)
        child.send_signal(number)
        out, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out) == (status, b"")
    assert errors.decode().endswith("error: interrupted; continue with: --out run --resume\n")
    assert os.listdir("run") == ["state.pt"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_sampling(tiny: str, number: int, status: int) -> None:
    script = (
        "import os, sys\n"
        "from stepfuse.engine.files import images\n"
        "from stepfuse.engine.cli import run\n"
        "encode = images.encode_png\n"
        "def slow(image, text=None):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    return encode(image, text)\n"
        "images.encode_png = slow\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    done = signalled.run(
        [sys.executable, "-c", script, *SAMPLE, "-m", tiny, "-n", "3", "-o", "images/"], timeout=120
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == "error: interrupted; no file was left half-written\n"
    assert os.listdir() == []


def test_a_signal_before_the_command_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(error: Exception) -> tuple[str, int]:
        signal.raise_signal(signal.SIGTERM)
        return "", 1

    monkeypatch.setattr(commands, "describe", ended)
    assert run(["no-such-command"]) == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_out_of_memory_names_an_option_of_the_command(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from stepfuse.engine.cli import drawing

    def too_much(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(drawing, "sample", too_much)
    for options, advice in (
        (["-n", "8"], "fewer images at a time need less (--batch-size, now 8)"),
        (
            ["-n", "8", "--batch-size", "2"],
            "fewer images at a time need less (--batch-size, now 2)",
        ),
        (["-n", "8", "--batch-size", "1"], "fewer images need less (-n, now 8)"),
        (["-n", "1"], "one image of this model is more than this machine holds"),
    ):
        assert sample(tiny, *options) == 1
        assert capsys.readouterr().err.startswith(f"error: out of memory; {advice}: Default")
    assert os.listdir() == []


def test_out_of_memory_in_training_names_options_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from stepfuse.engine.training.loop import Run

    np.savez("a.npz", images=np.zeros((2, 8, 8), np.uint8))

    def too_much(self: Run) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(Run, "advance", too_much)
    assert run(["train", "a.npz", "--out", "run", "--batch-size", "32"]) == 1
    error = capsys.readouterr().err
    assert "(--batch-size, now 32) or a smaller --network need less: Unable to" in error
    assert "-n" not in error.replace("--network", "").split()


def test_out_of_memory_elsewhere_advises_nothing() -> None:
    line, status = describe(MemoryError("Unable to allocate 9 GiB"))
    assert (line, status) == ("out of memory: Unable to allocate 9 GiB", 1)
    with (
        pytest.raises(Problem, match="out of memory; a smaller hat needs less: no"),
        interruptible("", "a smaller hat needs less"),
    ):
        raise MemoryError("no")


def test_the_streams_are_put_back(tiny: str) -> None:
    before = (sys.stdout, sys.stderr)
    assert sample(tiny, "-n", "1", "-o", "a.png") == 0
    assert run(["no-such-command"]) == 2
    assert (sys.stdout, sys.stderr) == before


def test_closed_streams(tiny: str) -> None:
    done = process(*SAMPLE, "-m", tiny, "-o", "a.png", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir() == ["a.png"]


@pytest.mark.parametrize("words", [["export", "-o", "a.onnx"], ["bench", "--json", "a.json"]])
def test_every_command_that_writes_ends_with_the_signal(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The signal comes while the file is written: it is whole, and nothing lies beside it."""
    from stepfuse.bench import running
    from stepfuse.engine.cli import exporting
    from stepfuse.engine.files import writing

    flush = writing._flush

    def ended(path: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        flush(path)

    def work(*arguments: Any, **named: Any) -> None:
        writing.write_file(words[-1], b"whole")
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(writing, "_flush", ended)
    monkeypatch.setattr(exporting, "export_to", work)
    monkeypatch.setattr(running, "run", work)
    assert run(words) == 143
    assert capsys.readouterr().err.startswith("error: interrupted")
    assert os.listdir() == [words[-1]]
    assert Path(words[-1]).read_bytes() == b"whole"
