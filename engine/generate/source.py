"""Where a job's network comes from: a checkpoint by name or path, or a function of the user's.

Everything that can be said of a checkpoint without reading a weight is, so that a job is checked
before a network is loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stepfuse.engine.files.reading import open_regular
from stepfuse.engine.generate import users
from stepfuse.engine.networks.checkpoint import SUFFIX, Checkpoint, describe, load, locate
from stepfuse.engine.networks.normalization import Normalization, decoded
from stepfuse.engine.networks.sampling_defaults import SamplingDefaults
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.kernels.checks import received

_CHUNK = 1 << 20


@runtime_checkable
class Trained(Protocol):
    """What a function of the user's returns; a `stepfuse.Checkpoint` is one."""

    model: Any
    schedule: Schedule
    prediction_type: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A network that has not been loaded.

    Attributes:
        name: as it was given: an embedded checkpoint, a path or "module:function".
        sha256: of the file of weights, or of the state_dict.
        schedule, prediction_type, sample_shape, labels: see `Checkpoint`.
        learned_variance: whether its outputs have 2C channels.
        normalization, sampling: see `Checkpoint`.
        load: makes the network anew.
    """

    name: str
    sha256: str
    schedule: Schedule
    prediction_type: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    learned_variance: bool
    normalization: Normalization | None
    sampling: SamplingDefaults
    load: Callable[[], Any]

    def decode(self, x: Tensor) -> Tensor:
        """Images in [0, 1] of samples [N, C, H, W], see `Checkpoint.decode`."""
        return decoded(x, self.normalization, self.sample_shape[0])

    @property
    def num_classes(self) -> int | None:
        """Number of classes, which is the index of the null class; None if unconditional."""
        return len(self.labels) or None


def open_source(name: str) -> Source:
    """The network of that name.

    "module:function" is imported, from the working directory too, and called without arguments; it
    returns a `Checkpoint`, or whatever else has ``model``, ``schedule``, ``prediction_type``,
    ``sample_shape`` and ``labels`` (empty for a model without classes, which is else called with
    ``labels=``).

    Raises ValueError for a name that is none of these, or whose function raises.
    """
    if not name:
        raise ValueError("--model must name a checkpoint, a file or a function; got ''")
    if ":" in name and not name.endswith(SUFFIX) and not os.path.exists(name):
        return _of_function(name)
    try:
        path = locate(name)
    except ValueError as error:
        raise ValueError(f"{error}, or module:function") from None
    about = describe(name)
    return Source(
        name=name,
        sha256=_file_hash(path),
        schedule=about.schedule,
        prediction_type=about.prediction_type,
        sample_shape=about.sample_shape,
        labels=about.labels,
        learned_variance=about.config.learned_variance,
        normalization=about.normalization,
        sampling=about.sampling,
        load=lambda: load(name).model,
    )


def _of_function(name: str) -> Source:
    make = users.find("--model", name)
    with users.blaming(f"--model {name}"):
        made: Any = make()
    if not isinstance(made, Trained):
        wanted = ", ".join(sorted(Trained.__annotations__))
        raise ValueError(
            f"--model {name} must return a Checkpoint or what else has {wanted}; "
            f"got {received(made)}"
        )
    config = getattr(made.model, "config", None)
    shape = tuple(made.sample_shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"--model {name}: sample_shape must be (C, H, W); got {shape}")
    return Source(
        name=name,
        sha256=_state_hash(name, made.model),
        schedule=made.schedule,
        prediction_type=made.prediction_type,
        sample_shape=shape,
        labels=tuple(made.labels),
        learned_variance=bool(getattr(config, "learned_variance", False)),
        normalization=made.normalization if isinstance(made, Checkpoint) else None,
        sampling=made.sampling if isinstance(made, Checkpoint) else SamplingDefaults(),
        load=lambda: made.model,
    )


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _state_hash(name: str, model: Any) -> str:
    """Of every weight and buffer with its name; of what has none, of the function's name."""
    digest = hashlib.sha256()
    if not isinstance(model, nn.Module):
        digest.update(name.encode())
        return digest.hexdigest()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()
