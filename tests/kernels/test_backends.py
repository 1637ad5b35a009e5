"""Which backend runs, and the reason where one cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from op_cases import entered

import stepfuse
from stepfuse.kernels import backends
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.backends import BackendUnavailable, resolve, why_not
from stepfuse.kernels.group_norm_silu import group_norm_silu

OPS = ("add_noise", "denoise_step", "group_norm_silu", "philox")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_reference_runs_everywhere(device: str) -> None:
    assert why_not("reference", device, torch.float64) == ""
    assert resolve("reference", device, torch.float64) == "reference"


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_float64_is_for_the_reference(backend: str) -> None:
    device = "cpu" if backend == "cpp" else "cuda"
    assert "float32, bfloat16 and float16, got torch.float64" in why_not(
        backend, device, torch.float64
    )
    assert resolve("auto", device, torch.float64) == "reference"


def test_each_backend_has_its_device() -> None:
    assert "runs CPU tensors, got a tensor on cuda" in why_not("cpp", "cuda")
    pytest.importorskip("triton")
    reason = why_not("triton", "cpu")
    assert "runs CUDA tensors, got a tensor on cpu" in reason
    assert "TRITON_INTERPRET=1" in reason
    with pytest.raises(BackendUnavailable, match="CUDA tensors"):
        group_norm_silu(torch.zeros(1, 2, 3), None, None, 1, backend="triton")


def test_the_interpreter_opens_triton_to_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not("triton", "cpu") == ""
    assert resolve("auto", "cpu") != "triton", "the interpreter is never chosen by itself"


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_what_is_not_installed_says_what_to_install(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" then falls back; a backend asked for by name does not."""
    reason = f"{backend} is not there; install it"
    monkeypatch.setattr(backends, f"_{backend}_problem", lambda: reason)
    device = "cpu" if backend == "cpp" else "cuda"
    assert resolve("auto", device) == "reference"
    with pytest.raises(BackendUnavailable, match="install it"):
        resolve(backend, device)


def test_missing_modules_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for problem, module in (
        (backends._cpp_problem, "stepfuse.kernels.cpp.module"),
        (backends._triton_problem, "triton"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)  # what makes an import fail
            reason = problem.__wrapped__()
        assert module.rpartition(".")[2] in reason
        assert "pip install" in reason


def test_unknown_backends_are_refused_even_where_nothing_runs() -> None:
    with pytest.raises(ValueError, match="auto, reference, cpp, triton; got 'cuda'"):
        why_not("cuda")
    with pytest.raises(ValueError, match="got 'cuda'"):
        add_noise(torch.zeros(2), None, 0, torch.ones(1), seed=0, backend="cuda")


def test_the_public_exception_is_this_one() -> None:
    assert stepfuse.BackendUnavailable is BackendUnavailable


@pytest.mark.parametrize("mode", ["reference", "cpp", "interpreter"])
@pytest.mark.parametrize("op", OPS)
def test_every_backend_has_every_op(mode: str, op: str) -> None:
    with entered(mode) as backend:
        module = backends.implementation(op, backend)
        names = {"philox": ("fill",), "group_norm_silu": ("run", "backward")}.get(op, ("run",))
        for name in names:
            assert callable(getattr(module, name))


def test_auto_is_the_fastest_that_is_there() -> None:
    expected = "reference" if why_not("cpp", "cpu") else "cpp"
    assert resolve("auto", "cpu", torch.float32) == expected
    x = torch.zeros(1)
    assert backends.function("add_noise", "run", "auto", x) is backends.function(
        "add_noise", "run", expected, x
    )


def test_importing_an_op_does_not_import_triton_or_a_compiler() -> None:
    """Start-up stays short: a backend is loaded when it first runs."""
    code = (
        "import sys, stepfuse.kernels.denoise_step;"
        "print([n for n in sys.modules if n == 'triton' or n.startswith('stepfuse.kernels.cpp')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
