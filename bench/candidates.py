"""Who takes part in `stepfuse bench`: how each is built, and why it cannot be."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stepfuse.bench import cuda_peers, peers
from stepfuse.bench.loops import DiffusersLoop, Loop, SamplerLoop, plain_loop, why_no_scheduler
from stepfuse.bench.record import Candidate
from stepfuse.bench.workload import Spec, Workload

OURS = "stepfuse"
LIBRARIES = ("diffusers", "compile", "onnxruntime", "openvino")
DTYPES = ("fp32", "bf16")
ONNX = ("onnx", "onnxscript")
CPU_ONLY = ("compile", "compile-bf16", "onnxruntime", "openvino", "openvino-bf16")


@dataclass(frozen=True)
class Entry:
    """A candidate before it is built.

    Attributes:
        name, library, dtype, how: see `stepfuse.bench.record.Candidate`.
        build: the loop for a batch size, ready but for what the library puts off.
        needs: packages it imports beside torch.
        on_gpu: whether it is one for GPUs alone, which nobody is told of on a CPU.
        diffusers_loop: whether it runs in diffusers' loop, which does not know all our settings.
    """

    name: str
    library: str
    dtype: str
    how: str
    build: Callable[[Workload, int], Loop]
    needs: tuple[str, ...] = ()
    diffusers_loop: bool = False
    on_gpu: bool = False

    def why_not(self, workload: Workload | None = None) -> str:
        """What is missing to run it; empty where nothing is."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} is not installed; pip install {' '.join(missing)}"
        if workload is None:
            return ""
        if workload.device.type != "cpu" and self.name in CPU_ONLY:
            return f"{self.name} is set up for the CPU here; the network is on {workload.device}"
        if workload.device.type != "cuda" and self.on_gpu:
            return f"{self.name} is for GPUs alone; the network is on {workload.device}"
        return why_no_scheduler(workload) if self.diffusers_loop else ""

    def described(self, spec: Spec) -> Candidate:
        """Its empty entry in the record."""
        how = self.how
        if self.name == "stepfuse" and not spec.optimize:
            how = how.replace("optimised network", "network as it is")
        if self.name != "stepfuse-eager" and spec.graph == "none":
            how = how.replace("captured step", "nothing captured")
        return Candidate(self.name, self.library, self.library == OURS, self.dtype, how)

    def import_packages(self) -> None:
        """Import what it needs, as a script of its own would."""
        for name in self.needs:
            importlib.import_module(name)


def _ours(workload: Workload, batch: int, dtype: torch.dtype | None = None) -> Loop:
    optimize: bool | torch.dtype = dtype if dtype is not None else workload.spec.optimize
    sampler = workload.sampler(
        workload.network, steps=workload.spec.steps, graph=workload.graph, optimize=optimize
    )
    return SamplerLoop(workload, batch, sampler)


def _ours_bfloat16(workload: Workload, batch: int) -> Loop:
    return _ours(workload, batch, torch.bfloat16)


def _ours_eager(workload: Workload, batch: int) -> Loop:
    sampler = workload.sampler(workload.network, steps=workload.spec.steps, graph=None)
    return SamplerLoop(workload, batch, sampler)


def _in_diffusers_loop(make: peers.Build) -> Callable[[Workload, int], Loop]:
    def build(workload: Workload, batch: int) -> Loop:
        model = workload.plain_twin(batch)
        return DiffusersLoop(workload, batch, make(model, workload.x_T(batch), workload.t(batch)))

    return build


def _in_plain_loop(make: peers.Build) -> Callable[[Workload, int], Loop]:
    def build(workload: Workload, batch: int) -> Loop:
        with torch.no_grad():
            call = make(workload.plain_twin(batch), workload.x_T(batch), workload.t(batch))
        return plain_loop(workload, batch, call)

    return build


_THEIR_LOOP = "the lines of diffusers' pipeline with its scheduler"
_PLAIN = "our plain loop: update in Python's order, nothing captured"
_NETWORK = "diffusers' network with the same weights"

_IN_GRAPH = f"one evaluation of {_NETWORK} as a CUDA graph"

ENTRIES = (
    Entry(
        "stepfuse", OURS, "fp32", "our sampler: optimised network, captured step", _ours
    ),
    Entry(
        "stepfuse-eager", OURS, "fp32", "our sampler: network as it is, nothing captured",
        _ours_eager,
    ),
    Entry(
        "stepfuse-bf16", OURS, "bf16",
        "our sampler: network optimised for bfloat16 products, captured step", _ours_bfloat16,
    ),
    Entry(
        "diffusers", "diffusers", "fp32", f"{_NETWORK} in {_THEIR_LOOP}",
        _in_diffusers_loop(peers.eager), ("diffusers",), True,
    ),
    Entry(
        "diffusers-bf16", "diffusers", "bf16",
        f"{_NETWORK}, in bfloat16 and channels-last, in {_THEIR_LOOP}",
        _in_diffusers_loop(peers.eager_bfloat16), ("diffusers",), True,
    ),
    Entry(
        "compile", "compile", "fp32",
        f"{_NETWORK} under torch.compile, weights frozen, in {_THEIR_LOOP}",
        _in_diffusers_loop(peers.inductor), ("diffusers",), True,
    ),
    Entry(
        "compile-bf16", "compile", "bf16",
        f"{_NETWORK} under torch.compile and bfloat16 autocast, weights frozen, in {_THEIR_LOOP}",
        _in_diffusers_loop(peers.inductor_bfloat16), ("diffusers",), True,
    ),
    *(
        Entry(
            f"{name}{ending}", name.partition("-")[0], dtype, f"{how}{words}, in {_THEIR_LOOP}",
            _in_diffusers_loop(cuda_peers.channels_last(build, precision)), ("diffusers",), True,
            True,
        )
        for ending, dtype, precision, words in (
            ("", "fp32", torch.float32, ", channels-last"),
            ("-bf16", "bf16", torch.bfloat16, ", in bfloat16 and channels-last"),
        )
        for name, how, build in (
            ("diffusers-graph", _IN_GRAPH, cuda_peers.graphed),
            ("compile-reduce-overhead", f"{_NETWORK} under torch.compile(mode='reduce-overhead')",
             cuda_peers.reduce_overhead),
            ("compile-max-autotune", f"{_NETWORK} under torch.compile(mode='max-autotune')",
             cuda_peers.max_autotune),
        )
    ),
    Entry(
        "onnxruntime", "onnxruntime", "fp32", f"ONNX Runtime with {_NETWORK} in {_PLAIN}",
        _in_plain_loop(peers.onnxruntime), ("onnxruntime", *ONNX, "diffusers"),
    ),
    Entry(
        "openvino", "openvino", "fp32", f"OpenVINO with {_NETWORK} in {_PLAIN}",
        _in_plain_loop(peers.openvino), ("openvino", *ONNX, "diffusers"),
    ),
    Entry(
        "openvino-bf16", "openvino", "bf16",
        f"OpenVINO in bfloat16 with {_NETWORK} in {_PLAIN}",
        _in_plain_loop(peers.openvino_bfloat16), ("openvino", *ONNX, "diffusers"),
    ),
)  # fmt: skip


def libraries(against: str) -> tuple[str, ...]:
    """The peers of a list like "diffusers,openvino", "all" or "none".

    Raises ValueError for a name that is not known, with those that are.
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    if names in ([], ["none"]):
        return ()
    if "all" in names:
        names = [*names, *LIBRARIES]
    for name in names:
        if name not in (*LIBRARIES, "all"):
            accepted = ", ".join((*LIBRARIES, "all", "none"))
            raise ValueError(f"--against must be of {accepted}; got {name!r}")
    return tuple(name for name in LIBRARIES if name in names)


def chosen(
    against: Sequence[str], dtype: str, optimize: bool = True, device: str = "cpu"
) -> list[Entry]:
    """Ours and those of the libraries ``against``, with their bfloat16 variants for "bf16".

    Those for GPUs alone take part where ``device`` is one.

    Raises ValueError for another dtype, or bf16 without our optimised network, which does it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if dtype == "bf16" and not optimize:
        raise ValueError("--dtype bf16 needs --optimize: it is what lowers the products")
    wanted = DTYPES[: DTYPES.index(dtype) + 1]
    gpu = torch.device(device).type == "cuda"
    there = [e for e in ENTRIES if gpu or not e.on_gpu]
    return [e for e in there if e.library in (OURS, *against) and e.dtype in wanted]


def entry(name: str) -> Entry:
    """The entry of that name. Raises ValueError with the names there are."""
    for e in ENTRIES:
        if e.name == name:
            return e
    names = ", ".join(e.name for e in ENTRIES)
    raise ValueError(f"no candidate is named {name!r}; accepted: {names}")
