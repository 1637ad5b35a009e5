"""Checkpoints: one safetensors file with weights, network, schedule and labels. No pickle.

The embedded ones are in ``checkpoints/`` beside this file and are loaded by name.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from stepfuse._version import __version__
from stepfuse.engine.files.reading import NOT_THERE, kind_of, open_regular, read_text
from stepfuse.engine.files.writing import write_file
from stepfuse.engine.networks.build import build
from stepfuse.engine.networks.normalization import Normalization, decoded
from stepfuse.engine.networks.sampling_defaults import SamplingDefaults, sampler_settings
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.update import PredictionType
from stepfuse.kernels.arguments import (
    as_sizes,
    check_kind,
    check_literal,
    check_mapping,
    check_path,
    check_text,
)
from stepfuse.kernels.checks import received
from stepfuse.kernels.limits import check_memory

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints"
FAMILY = "stepfuse-"
FORMAT = f"{FAMILY}unet-1"
KEYS = {
    *("unet", "schedule", "prediction_type", "sample_shape", "labels", "training"),
    *("normalization", "sampling"),  # may be absent
}
SUFFIX = ".safetensors"
BETAS = "schedule.betas"
_OVERRIDES = list(inspect.signature(Sampler).parameters)[2:]  # but model and schedule
MOST_WORDS = 500  # characters of a reason


@dataclass(frozen=True)
class Checkpoint:
    """A trained denoiser and what is needed to sample from it.

    Attributes:
        model: the network, float32, in evaluation mode, without gradients.
        schedule: the forward process it was trained on.
        prediction_type: "epsilon", "sample" or "v_prediction".
        sample_shape: (C, H, W) of the training images.
        labels: names of the classes; empty for an unconditional network.
        training: steps, images, loss and the like, as recorded by the trainer.
        card: the model card, markdown.
        normalization: of the images it was trained on; None where they are pixels in [-1, 1].
        sampling: how it is sampled where nobody asks for something else.

    Raises TypeError or ValueError for an attribute that is none of these.
    """

    model: UNet
    schedule: Schedule
    prediction_type: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    training: dict[str, Any]
    card: str
    normalization: Normalization | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def __post_init__(self) -> None:
        check_kind("model", self.model, UNet, "a UNet")
        check_kind("schedule", self.schedule, Schedule, "a Schedule")
        check_literal("prediction_type", self.prediction_type, PredictionType)
        sizes = as_sizes("sample_shape", self.sample_shape)
        if len(sizes) != 3:
            raise ValueError(f"sample_shape must be (C, H, W); got {sizes}")
        names = self.labels
        if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"labels must be a tuple of strings; got {received(names)}")
        check_mapping("training", self.training)
        check_text("card", self.card)
        check_kind("sampling", self.sampling, SamplingDefaults, "a SamplingDefaults")
        if self.normalization is not None:
            kind = "a Normalization or None"
            check_kind("normalization", self.normalization, Normalization, kind)
            if len(self.normalization.mean) != sizes[0]:
                raise ValueError(
                    f"normalization must have {sizes[0]} channels like sample_shape; got "
                    f"{len(self.normalization.mean)}"
                )

    @property
    def num_classes(self) -> int | None:
        """Number of classes, which is the index of the null class; None if unconditional."""
        return self.model.config.num_classes

    @property
    def learned_variance(self) -> bool:
        """Whether the network's output has 2C channels."""
        return self.model.config.learned_variance

    def sampler(self, **overrides: Any) -> Sampler:
        """The `Sampler` of this network, as it was trained and is usually sampled.

        ``overrides`` are its other arguments, or others in the place of the checkpoint's: method,
        steps, spacing, eta (None for the checkpoint's own), prediction_type, variance_type and
        clip_sample, which is None where there is a normalization. Raises as `Sampler` does.
        """
        for name in overrides:
            if name not in _OVERRIDES:
                raise TypeError(
                    f"sampler has no argument {name!r}; accepted: {', '.join(_OVERRIDES)}"
                )
        return Sampler(self.model, self.schedule, **sampler_settings(self, overrides))

    def decode(self, x: Tensor) -> Tensor:
        """Images in [0, 1] of samples x [N, C, H, W]: clamp((x + 1) / 2, 0, 1), or with a
        normalization clamp(mean + std x, 0, 1). Float32, or float64 of such.

        Raises TypeError or ValueError for what are no samples of this network.
        """
        return decoded(x, self.normalization, self.sample_shape[0])


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its network; the attributes of `Checkpoint`, without weights."""

    config: UNetConfig
    schedule: Schedule
    prediction_type: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    training: dict[str, Any]
    normalization: Normalization | None
    sampling: SamplingDefaults

    @classmethod
    def read(cls, metadata: Mapping[str, str], betas: Tensor) -> Description:
        """From the metadata of a file; any of several errors for what describes no network."""
        info = json.loads(metadata[FORMAT])
        unknown = sorted(set(info) - KEYS)
        if unknown:
            raise ValueError(
                f"it has {', '.join(unknown)}, which stepfuse {__version__} does not know: it "
                "needs a newer version"
            )
        config = UNetConfig.from_dict(info["unet"])
        described = _described(info, config)
        schedule = Schedule.from_betas(betas, info["schedule"])
        return cls(config=config, schedule=schedule, **described)


def models() -> list[str]:
    """Names of the embedded checkpoints, which `load` takes."""
    return sorted(file.stem for file in FOLDER.glob(f"*{SUFFIX}"))


def load(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """Load an embedded checkpoint by its name or any other by its path. Never uses a network.

    The model card of a file is the .md file of the same name beside it.

    Nothing is built before the description was compared with the weights that are there.

    Raises:
        ValueError: unknown name, missing, truncated or foreign file, or a description that does not
            fit the weights or this machine.
        OSError: a file that may not be read.
    """
    path = locate(name_or_path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with _describing(path):
        about = Description.read(metadata, tensors.pop(BETAS))
        model = build(about.config, tensors)
        model.follow(about.schedule)
        return Checkpoint(
            model=model,
            schedule=about.schedule,
            prediction_type=about.prediction_type,
            sample_shape=about.sample_shape,
            labels=about.labels,
            training=about.training,
            card=_card(path),
            normalization=about.normalization,
            sampling=about.sampling,
        )


def describe(name_or_path: str | os.PathLike[str]) -> Description:
    """What `load` would say of its network, without reading a weight. Raises as `load` does."""
    path = locate(name_or_path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        with _describing(path):
            betas = file.get_tensor(BETAS)
    with _describing(path):
        return Description.read(metadata, betas)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, as safetensors reads it; ValueError for one that is damaged or of somebody else."""
    with open_regular(path):  # says why, where the library would call it damaged
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            later = [key for key in metadata if key.startswith(FAMILY) and key != FORMAT]
            if FORMAT not in metadata and later:
                raise ValueError(
                    f"{path} is a checkpoint of the kind {later[0]!r}, which stepfuse "
                    f"{__version__} does not know: it needs a newer version; accepted: {FORMAT!r}"
                )
            if FORMAT not in metadata:
                raise ValueError(
                    f"{path} is no stepfuse checkpoint: it has metadata {sorted(metadata)}, "
                    f"not {FORMAT!r}"
                )
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None


@contextlib.contextmanager
def _describing(path: Path) -> Iterator[None]:
    """What is wrong inside is wrong with the description in the file."""
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:MOST_WORDS]
        raise ValueError(f"{path} does not describe a network: {reason}") from None


def save(
    path: str | os.PathLike[str],
    model: UNet,
    schedule: Schedule,
    *,
    prediction_type: str = "epsilon",
    sample_shape: tuple[int, int, int],
    labels: Sequence[str] = (),
    training: dict[str, Any] | None = None,
    normalization: Normalization | None = None,
    sampling: SamplingDefaults | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a checkpoint that ``load`` reads, with its weights in ``dtype``.

    The file is whole or it is not there, see ``write_file``.

    Raises:
        ValueError: weights that are not finite in ``dtype``, or labels that do not fit the network.
    """
    if len(labels) != (model.config.num_classes or 0):
        raise ValueError(
            f"{len(labels)} labels given; the network has {model.config.num_classes or 0} classes"
        )
    tensors = {BETAS: schedule.betas.contiguous()}
    for key, weight in model.state_dict().items():
        tensors[key] = weight.detach().to("cpu", dtype).contiguous()
        if not bool(torch.isfinite(tensors[key]).all()):
            raise ValueError(f"{key} is not finite in {dtype}")
    info: dict[str, Any] = {
        "unet": asdict(model.config),
        "schedule": schedule.name,
        "prediction_type": prediction_type,
        "sample_shape": list(sample_shape),
        "labels": list(labels),
        "training": training or {},
    }
    if normalization is not None:
        info["normalization"] = normalization.to_json()
    if sampling is not None and sampling.to_json():
        info["sampling"] = sampling.to_json()
    write_file(path, serialise(tensors, {FORMAT: json.dumps(info, sort_keys=True)}))


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of an embedded checkpoint's name, or of a path; ValueError where there is none."""
    name = os.fspath(check_path("name_or_path", name_or_path))
    inside = FOLDER / f"{name}{SUFFIX}"
    if Path(name).name == name and inside.is_file():
        return inside
    kind = kind_of(name)
    if kind is None:
        return Path(name)
    if kind != NOT_THERE:
        raise ValueError(
            f"{name} is {kind}; accepted: {', '.join(map(repr, models()))} or the path of a "
            f"{SUFFIX} file"
        )
    raise ValueError(
        f"unknown checkpoint {name!r}; accepted: {', '.join(map(repr, models()))} "
        f"or the path of a {SUFFIX} file"
    )


def _described(info: dict[str, Any], config: UNetConfig) -> dict[str, Any]:
    """Attributes of `Checkpoint` from the metadata; ValueError for what no network has."""
    prediction_type, labels = info["prediction_type"], info["labels"]
    shape, training = info["sample_shape"], info["training"]
    divisor = config.size_divisor
    whole = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int for n in shape)
    checks = [
        (
            "prediction_type",
            prediction_type,
            prediction_type in get_args(PredictionType),
            " or ".join(map(repr, get_args(PredictionType))),
        ),
        (
            "labels",
            labels,
            isinstance(labels, list)
            and all(isinstance(label, str) for label in labels)
            and len(labels) == (config.num_classes or 0),
            f"{config.num_classes or 0} names",
        ),
        (
            "sample_shape",
            shape,
            whole
            and shape[0] == config.in_channels
            and min(shape) >= 1
            and shape[1] % divisor == shape[2] % divisor == 0,
            f"[{config.in_channels}, H, W] with H and W divisible by {divisor}",
        ),
        ("training", training, isinstance(training, dict), "an object"),
        ("schedule", info["schedule"], isinstance(info["schedule"], str), "a name"),
    ]
    for name, value, good, accepted in checks:
        if not good:
            raise ValueError(f"{name} is {str(value)[:60]!r}; accepted: {accepted}")
    channels, height, width = shape
    check_memory(f"an image of {channels}x{height}x{width}", 4 * channels * height * width)
    normalization = info.get("normalization")
    if normalization is not None:
        normalization = Normalization.from_json(normalization, channels)
    return {
        "normalization": normalization,
        "sampling": SamplingDefaults.from_json(info.get("sampling", {})),
        "prediction_type": prediction_type,
        "labels": tuple(labels),
        "sample_shape": (channels, height, width),
        "training": training,
    }


def _card(path: Path) -> str:
    """The text beside a checkpoint; empty where there is none or it cannot be read."""
    beside = path.with_suffix(".md")
    try:
        return read_text(beside)
    except (ValueError, OSError):
        return ""
