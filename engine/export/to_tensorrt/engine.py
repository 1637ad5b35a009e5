"""ONNX in, TensorRT engine out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from stepfuse._version import __version__
from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.precisions import PRECISIONS
from stepfuse.engine.export.to_onnx.facts import OnnxFacts, read_facts
from stepfuse.engine.export.to_tensorrt.engine_file import (
    EngineInfo,
    Layer,
    TensorSpec,
    write_engine,
)
from stepfuse.engine.export.to_tensorrt.library import (
    Library,
    Messages,
    find_library,
    parse_compute_capabilities,
    progress_monitor,
)
from stepfuse.engine.files.reading import NOT_THERE, kind_of, open_regular
from stepfuse.engine.files.signals import kept
from stepfuse.engine.files.writing import check_file, write_file
from stepfuse.kernels.arguments import check_path
from stepfuse.kernels.backends import BackendUnavailable
from stepfuse.kernels.checks import as_integer, check_flag, check_word

# what TensorRT calls the types of inputs and outputs: names of PyTorch's
_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


class BuildFailed(RuntimeError):
    """TensorRT cannot build this network; the message is its own."""


def tensorrt(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    *,
    precision: str | None = None,
    batch: str | int | BatchProfile = "1:8:64",
    compute_capability: str | Sequence[str] | None = None,
    strongly_typed: bool = True,
    tf32: bool = False,
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    library: str | None = None,
    progress: bool = False,
) -> EngineInfo:
    """Build a TensorRT engine from an ONNX file and write it with a header, see `tensorrt_file`.

    TensorRT-RTX builds on a machine without a GPU; TensorRT needs the GPU that the engine is for.

    Args:
        onnx_path: of `stepfuse.export.onnx`, or any file with a batch as its only dynamic axis.
            A second file with its weights stays beside it.
        engine_path: where the engine goes; appears whole or not at all.
        precision: "fp32", "fp16" or "bf16". A strongly typed network keeps the types of the file,
            so that this only checks them; None takes what the file has.
        batch: the optimisation profile MIN:OPT:MAX; an engine is fastest at OPT and takes nothing
            outside MIN .. MAX.
        compute_capability: "sm_89", or several, of a GPU that need not be here (TensorRT-RTX);
            None leaves the choice to the library.
        strongly_typed: False lets TensorRT 10 choose between float32 and ``precision`` layer by
            layer; later ones and TensorRT-RTX have strong types only.
        tf32: let float32 products round their factors to 10 bits.
        workspace: most bytes of scratch memory that a kernel may ask for; None for no limit.
        timing_cache: file with the times of kernels, read where it exists and written afterwards.
            TensorRT-RTX times nothing when it builds: there the file has no content of use.
        library: "tensorrt" or "tensorrt_rtx"; None for what is installed.
        progress: show a progress bar.

    Returns what the header of the file says.

    Raises ValueError for settings that do not fit together or the file, `BuildFailed` with the
    library's own errors, `BackendUnavailable` where there is no library, OSError for files.
    Ctrl-C ends the build and leaves no file.
    """
    check_path("onnx_path", onnx_path)
    check_path("engine_path", engine_path)
    for name, flag in (("strongly_typed", strongly_typed), ("tf32", tf32), ("progress", progress)):
        check_flag(name, flag)
    if precision is not None:
        check_word("precision", precision, PRECISIONS)
    if workspace is not None and not 1 <= as_integer("workspace", workspace) < 2**63:
        raise ValueError(f"workspace must be in 1 .. 2^63-1 bytes, or None; got {workspace}")
    if timing_cache is not None:
        check_path("timing_cache", timing_cache)
    found = find_library(library)
    profile = BatchProfile.parse(batch)
    targets = parse_compute_capabilities(found, compute_capability)
    facts = read_facts(onnx_path)
    check_file(engine_path)
    chosen = _check_precision(found, facts, precision, strongly_typed)

    messages = Messages(found)
    trt = found.module
    try:
        builder = trt.Builder(messages.logger)
    except TypeError as error:  # its way of saying that there is none, without a GPU say
        reason = messages.reason() if messages.errors else error
        raise BackendUnavailable(f"{found} cannot build here: {reason}") from None
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(typed) if strongly_typed and typed is not None else 0)
    _parse(found, network, messages, facts.path)

    config = builder.create_builder_config()
    _set_flags(found, config, chosen, strongly_typed, tf32)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    for index, target in enumerate(targets):
        config.num_compute_capabilities = len(targets)
        capability = getattr(trt.ComputeCapability, target.upper().replace("_", ""))
        config.set_compute_capability(capability, index)
    _set_profile(builder, network, config, profile, messages)
    _load_timings(config, timing_cache)

    plan = _build(found, builder, network, config, messages, progress)
    info = EngineInfo(
        library=found.name,
        library_version=found.version,
        compute_capabilities=targets,
        batch=profile,
        precision=chosen,
        strongly_typed=strongly_typed,
        inputs=tuple(_spec(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_spec(network.get_output(i)) for i in range(network.num_outputs)),
        metadata=facts.metadata,
        onnx_sha256=hashlib.sha256(facts.path.read_bytes()).hexdigest(),
        layers=_layers(messages.layers),
        stepfuse_version=__version__,
    )
    write_engine(engine_path, info, plan)
    _save_timings(config, timing_cache)
    return info


def _check_precision(
    library: Library, facts: OnnxFacts, precision: str | None, strongly_typed: bool
) -> str:
    if strongly_typed:
        if precision not in (None, facts.precision):
            raise ValueError(
                f"{facts.path} holds {facts.precision} weights, and a strongly typed engine keeps "
                f"them; got precision={precision!r}: export the ONNX file in that precision"
            )
        return facts.precision
    chosen = precision or facts.precision
    if chosen != "fp32" and not hasattr(library.module.BuilderFlag, chosen.upper()):
        raise ValueError(
            f"strongly_typed=False with {chosen} needs TensorRT 10; {library} takes its types from "
            "the ONNX file: export that in the precision wanted"
        )
    return chosen


def _parse(library: Library, network: Any, messages: Messages, path: Path) -> None:
    """Fill the network from the file; the error names the node and its operator."""
    parser = library.module.OnnxParser(network, messages.logger)
    if parser.parse_from_file(str(path)):
        return
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = ""
        if error.node() >= 0:
            name = f" {error.node_name()!r}" if error.node_name() else ""
            where = f"node {error.node()}{name} ({error.node_operator()}): "
        reasons.append(f"{where}{' '.join(error.desc().split())} [{error.func()}]")
    raise BuildFailed(f"{library} cannot read {path}: {'; '.join(reasons) or messages.reason()}")


def _set_flags(
    library: Library, config: Any, precision: str, strongly_typed: bool, tf32: bool
) -> None:
    flags = library.module.BuilderFlag
    if not tf32:
        config.clear_flag(flags.TF32)
    if not strongly_typed and precision != "fp32":
        config.set_flag(getattr(flags, precision.upper()))
    config.profiling_verbosity = library.module.ProfilingVerbosity.DETAILED


def _set_profile(
    builder: Any, network: Any, config: Any, profile: BatchProfile, messages: Messages
) -> None:
    """Tell the builder which batches come. Only axis 0 may be dynamic."""
    described = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise ValueError(
                f"input {tensor.name!r} has shape {shape}; accepted: a batch as the only axis "
                "of unknown size"
            )
        if shape[:1] == (-1,):
            dynamic = True
            sizes = (profile.minimum, profile.optimum, profile.maximum)
            described.set_shape(tensor.name, *((size, *shape[1:]) for size in sizes))
        elif shape and (profile.minimum, profile.maximum) != (shape[0], shape[0]):
            raise ValueError(
                f"input {tensor.name!r} has the fixed shape {shape}; accepted: batch={shape[0]}, "
                f"got {profile}"
            )
    if dynamic and config.add_optimization_profile(described) < 0:
        raise BuildFailed(f"batch {profile}: {messages.reason()}")


def _build(
    library: Library, builder: Any, network: Any, config: Any, messages: Messages, progress: bool
) -> bytes:
    """The plan. Signals are kept until the library returns: they must not pass its frames."""
    bar = tqdm(total=0, unit="step", desc="building", disable=not progress, leave=False)
    with bar, kept() as signals:

        def advance(phase: str, steps: int) -> bool:
            if steps >= 0:
                bar.total += steps
                bar.set_description(phase.lower()[:40])
            else:
                bar.update()
            return not signals.pending

        monitor = progress_monitor(library, advance)
        if monitor is not None:
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        interrupted = bool(signals.pending)
    if interrupted:
        raise KeyboardInterrupt  # where a handler of the caller's own took the signal
    if plan is None:
        raise BuildFailed(f"{library} cannot build this network: {messages.reason()}")
    return bytes(plan)


def _spec(tensor: Any) -> TensorSpec:
    return TensorSpec(
        tensor.name, tuple(tensor.shape), _NAMES.get(tensor.dtype.name, tensor.dtype.name.lower())
    )


def _layers(lines: Sequence[str]) -> tuple[Layer, ...]:
    """What the builder's log says about each layer of the finished engine."""
    layers = []
    for line in lines:
        named = re.match(r"Name: (.*?), LayerType: (\w+)", line)
        if named:
            nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", line)
            layers.append(Layer(named[1], named[2], tuple(nodes)))
    return tuple(layers)


def _load_timings(config: Any, path: str | os.PathLike[str] | None) -> None:
    if path is None:
        return
    check_file(path)
    content = b""
    if kind_of(path) != NOT_THERE:
        with open_regular(path, "a timing cache") as file:
            content = file.read()
    with _quietly():
        cache = config.create_timing_cache(content)
        taken = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    if not taken:
        raise ValueError(f"{path} is no timing cache of this library and GPU; remove it")


def _save_timings(config: Any, path: str | os.PathLike[str] | None) -> None:
    if path is None:
        return
    with _quietly():
        write_file(path, bytes(config.get_timing_cache().serialize()))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """TensorRT-RTX warns that its timing cache does nothing; the documentation here says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
