"""The engine file: a header of our own, then the plan that TensorRT wrote.

    8 bytes    "SFENGINE"
    4 bytes    version of this format, little-endian, like the next
    8 bytes    length of the header
    32 bytes   SHA-256 of the header
    header     JSON, see `EngineInfo`, with size and SHA-256 of the plan
    plan

A plan by itself says neither which network it holds nor what it was made for, and a library that is
handed one of another version fails in words of its own, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.files.reading import open_regular, reason
from stepfuse.engine.files.writing import write_file

MAGIC = b"SFENGINE"
FORMAT_VERSION = 1
_PREFIX = struct.Struct("<8sIQ32s")


class BadEngineFile(ValueError):
    """The file is no engine file, is damaged, or was built by something else."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: -1 in ``shape`` is the batch; ``dtype`` is PyTorch's name for it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class EngineInfo:
    """What the header of an engine file says.

    Attributes:
        library: "tensorrt" or "tensorrt_rtx".
        library_version: of the builder; the engine runs with this version only.
        compute_capabilities: that were asked for, as "sm_89"; empty for the library's choice.
        batch: the optimisation profile.
        precision: "fp32", "fp16" or "bf16", of the weights.
        strongly_typed: whether the types are those of the ONNX file.
        inputs, outputs: in the network's order.
        metadata: that of the ONNX file: schedule, prediction type and so on.
        onnx_sha256: of the ONNX file.
        layers: what the builder made of the network: name, type, and the ONNX nodes inside.
        stepfuse_version: that wrote this.
    """

    library: str
    library_version: str
    compute_capabilities: tuple[str, ...]
    batch: BatchProfile
    precision: str
    strongly_typed: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    onnx_sha256: str
    layers: tuple[Layer, ...]
    stepfuse_version: str


@dataclass(frozen=True)
class Layer:
    """One kernel or library call of an engine, with the ONNX nodes that were fused into it."""

    name: str
    kind: str
    nodes: tuple[str, ...]


def write_engine(path: str | os.PathLike[str], info: EngineInfo, plan: bytes) -> None:
    """Write the file, whole or not at all."""
    header = json.dumps(
        {**asdict(info), "plan_bytes": len(plan), "plan_sha256": hashlib.sha256(plan).hexdigest()}
    ).encode()
    prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(header), hashlib.sha256(header).digest())
    write_file(path, b"".join((prefix, header, plan)))


def read_info(path: str | os.PathLike[str]) -> EngineInfo:
    """The header alone: what an engine is, on any machine, without TensorRT.

    Raises `BadEngineFile`, or OSError where the file cannot be read.
    """
    with _opened(path) as file:
        return _info(_header(path, file))


def read_engine(path: str | os.PathLike[str]) -> tuple[EngineInfo, bytes]:
    """Header and plan, checked against their SHA-256.

    Raises `BadEngineFile` for a foreign, truncated or altered file, OSError for an unreadable one.
    """
    with _opened(path) as file:
        values = _header(path, file)
        plan = file.read()
    size = values["plan_bytes"]
    if len(plan) != size:
        what = "truncated" if len(plan) < size else "too long"
        raise BadEngineFile(f"{path} is {what}: its plan has {len(plan)} bytes instead of {size}")
    if hashlib.sha256(plan).hexdigest() != values["plan_sha256"]:
        raise BadEngineFile(f"{path} was altered: the SHA-256 of its plan is not the recorded one")
    return _info(values), plan


def check_library(path: str | os.PathLike[str], info: EngineInfo, name: str, version: str) -> None:
    """Raise `BadEngineFile` unless the library is the one that built the engine."""
    if (info.library, info.library_version) != (name, version):
        raise BadEngineFile(
            f"{path} was built by {info.library} {info.library_version} and runs with nothing "
            f"else; here is {name} {version}: build it again, or install that version"
        )


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open_regular(path, "an engine file of stepfuse")
    except ValueError as error:
        raise BadEngineFile(str(error)) from None


def _header(path: str | os.PathLike[str], file: Any) -> dict[str, Any]:
    start = file.read(_PREFIX.size)
    if start[: len(MAGIC)] != MAGIC:
        raise BadEngineFile(f"{path} is no stepfuse engine: it starts with {start[:8]!r}")
    if len(start) < _PREFIX.size:
        raise BadEngineFile(f"{path} is truncated: it has {len(start)} bytes")
    _, version, length, digest = _PREFIX.unpack(start)
    if version != FORMAT_VERSION:
        raise BadEngineFile(f"{path} has format {version}; accepted: {FORMAT_VERSION}")
    header = file.read(min(length, os.fstat(file.fileno()).st_size))
    if len(header) != length:
        raise BadEngineFile(f"{path} is truncated: its header has {len(header)} of {length} bytes")
    if hashlib.sha256(header).digest() != digest:
        raise BadEngineFile(
            f"{path} was altered: the SHA-256 of its header is not the recorded one"
        )
    try:
        values: dict[str, Any] = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise BadEngineFile(f"{path} has a header that is no JSON: {reason(error)}") from None
    return values


def _info(values: dict[str, Any]) -> EngineInfo:
    known = {k: v for k, v in values.items() if k not in ("plan_bytes", "plan_sha256")}
    for side in ("inputs", "outputs"):
        known[side] = tuple(
            TensorSpec(spec["name"], tuple(spec["shape"]), spec["dtype"]) for spec in known[side]
        )
    known["layers"] = tuple(
        Layer(layer["name"], layer["kind"], tuple(layer["nodes"])) for layer in known["layers"]
    )
    known["batch"] = BatchProfile(**known["batch"])
    known["compute_capabilities"] = tuple(known["compute_capabilities"])
    return EngineInfo(**known)
