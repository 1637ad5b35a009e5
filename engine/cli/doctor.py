"""``stepfuse doctor``: what this machine can run, and why not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from stepfuse._version import __version__
from stepfuse.engine.cli.errors import interruptible

# what is looked for: modules, names of their packages, what they are for, and the extra
PACKAGES = (
    (("onnx",), ("onnx",), "stepfuse export", "onnx"),
    (("onnxruntime",), ("onnxruntime", "onnxruntime-gpu"), "checking what was exported", "onnx"),
    (
        ("tensorrt_rtx_bindings", "tensorrt_rtx", "tensorrt"),
        ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx", "tensorrt"),
        "building engines",
        "tensorrt",
    ),
    (("diffusers",), ("diffusers",), "accelerating its pipelines", "adapters"),
    (
        ("denoising_diffusion_pytorch",),
        ("denoising-diffusion-pytorch",),
        "accelerating its models",
        "adapters",
    ),
)
CPU_FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_bf16", "amx_bf16")


class Finding(NamedTuple):
    """One line of the report: yes, no, or plain information (None), and the details."""

    what: str
    good: bool | None
    details: str


def doctor() -> None:
    """Say what this machine can run, and why not."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    marks = {True: Text("yes", "green"), False: Text("no", "yellow"), None: Text("")}
    with interruptible("nothing was written"):
        for title, findings in report():
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title_justify="left")
            table.title = Text(title, "bold")
            table.add_column(min_width=14)
            table.add_column(min_width=3)
            table.add_column(overflow="fold")
            for finding in findings:
                table.add_row(Text(finding.what), marks[finding.good], Text(finding.details))
            console.print(table)
            console.print()


def report() -> Iterator[tuple[str, list[Finding]]]:
    """The sections, with their findings."""
    yield "Machine", [*_machine(), *_cuda()]
    yield "Backends of the fused operations", list(_backends())
    yield "Optional packages", [_package(*entry) for entry in PACKAGES]
    yield "Embedded checkpoints", list(_checkpoints())


def _machine() -> Iterator[Finding]:
    import torch

    # older versions of PyTorch know one word only
    known = getattr(torch.cpu, "get_capabilities", None)
    capabilities = known() if known else {}
    yield Finding("stepfuse", None, f"{__version__}, Python {platform.python_version()}")
    yield Finding("PyTorch", None, torch.__version__)
    name = capabilities.get("cpu_name") or platform.processor() or "unknown model"
    yield Finding("CPU", None, f"{name}, {platform.machine()}, {os.cpu_count()} logical cores")
    present = [feature for feature in CPU_FEATURES if capabilities.get(feature)]
    missing = [feature for feature in CPU_FEATURES if feature not in present]
    words = f"{', '.join(present) or 'none of interest'}; not there: {', '.join(missing) or 'none'}"
    yield Finding("instructions", None, words if known else torch.backends.cpu.get_cpu_capability())
    yield Finding("threads", None, f"{torch.get_num_threads()} (--threads, OMP_NUM_THREADS)")


def _cuda() -> Iterator[Finding]:
    import torch

    if torch.version.cuda is None:
        yield Finding(
            "CUDA", False, f"PyTorch {torch.__version__} is built without it; see pytorch.org"
        )
        return
    if not torch.cuda.is_available():
        yield Finding("CUDA", False, f"PyTorch has CUDA {torch.version.cuda}, but {_no_driver()}")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(
            f"cuda:{index}",
            True,
            f"{device.name}, sm_{device.major}{device.minor}, "
            f"{device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
        )


def _no_driver() -> str:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "sees no device"


def _backends() -> Iterator[Finding]:
    import torch

    from stepfuse.kernels.backends import BACKENDS

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for backend in BACKENDS:
        for device in devices:
            yield _backend(backend, device)
    if "cuda" not in devices:
        triton = _backend("triton", "cuda")
        missing = "a CUDA device is missing" if triton.good else triton.details
        yield Finding("triton on cuda", False, missing)


def _backend(backend: str, device: str) -> Finding:
    from stepfuse.kernels.backends import resolve, why_not

    name = f"{backend} on {device}"
    try:
        if backend == "auto":
            return Finding(name, True, f"takes {resolve(backend, device)}")
        reason = why_not(backend, device)
    except ValueError as error:
        # a setting in the environment that cannot be honoured
        return Finding(name, False, str(error))
    if reason:
        return Finding(name, False, reason)
    if backend == "cpp":
        module = importlib.import_module("stepfuse.kernels.cpp.module")
        built = [isa for isa in module.ISAS if importlib.util.find_spec(f"stepfuse._cpu_{isa}")]
        return Finding(name, True, f"the {module.isa} module; built: {', '.join(built)}")
    return Finding(name, True, f"Triton {_version('triton')}" if backend == "triton" else "PyTorch")


def _package(modules: tuple[str, ...], names: tuple[str, ...], purpose: str, extra: str) -> Finding:
    if not any(importlib.util.find_spec(module) for module in modules):
        return Finding(modules[-1], False, f"for {purpose}: pip install 'stepfuse[{extra}]'")
    found = next((v for v in map(_version, names) if v), "version unknown")
    return Finding(modules[-1], True, f"{found}, for {purpose}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _checkpoints() -> Iterator[Finding]:
    from stepfuse.engine.networks.checkpoint import FOLDER, SUFFIX, load, models

    if not models():
        yield Finding("none", False, f"{FOLDER} holds no {SUFFIX} files; give --model a path")
    for name in models():
        try:
            checkpoint = load(name)
        except ValueError as error:
            yield Finding(name, False, str(error))
            continue
        channels, height, width = checkpoint.sample_shape
        weights = sum(p.numel() for p in checkpoint.model.parameters())
        yield Finding(
            name,
            True,
            f"{channels}x{height}x{width}, {checkpoint.num_classes or 'no'} classes, "
            f"{weights / 1e6:.1f} M weights, "
            f"{checkpoint.schedule.num_train_timesteps} training steps",
        )
