"""Checkpoints: one safetensors file with weights, network, schedule and labels. No pickle.

The embedded ones are in ``checkpoints/`` beside this file and are loaded by name.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepfuse.engine.files.reading import NOT_THERE, kind_of, open_regular, read_text
from stepfuse.engine.files.writing import write_file
from stepfuse.engine.networks.unet import UNet, UNetConfig
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
FORMAT = "stepfuse-unet-1"
SUFFIX = ".safetensors"
BETAS = "schedule.betas"
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

    Raises TypeError or ValueError for an attribute that is none of these.
    """

    model: UNet
    schedule: Schedule
    prediction_type: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    training: dict[str, Any]
    card: str

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

    @property
    def num_classes(self) -> int | None:
        """Number of classes, which is the index of the null class; None if unconditional."""
        return self.model.config.num_classes


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its network; the attributes of `Checkpoint`, without weights."""

    config: UNetConfig
    schedule: Schedule
    prediction_type: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    training: dict[str, Any]

    @classmethod
    def read(cls, metadata: Mapping[str, str], betas: Tensor) -> Description:
        """From the metadata of a file; any of several errors for what describes no network."""
        info = json.loads(metadata[FORMAT])
        config = UNetConfig.from_dict(info["unet"])
        described = _described(info, config)
        schedule = Schedule.from_betas(betas, info["schedule"])
        return cls(config=config, schedule=schedule, **described)


def embedded() -> list[str]:
    """Names of the checkpoints inside the package."""
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
        return Checkpoint(
            model=_build(about.config, tensors),
            schedule=about.schedule,
            prediction_type=about.prediction_type,
            sample_shape=about.sample_shape,
            labels=about.labels,
            training=about.training,
            card=_card(path),
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
    info = {
        "unet": asdict(model.config),
        "schedule": schedule.name,
        "prediction_type": prediction_type,
        "sample_shape": list(sample_shape),
        "labels": list(labels),
        "training": training or {},
    }
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
            f"{name} is {kind}; accepted: {', '.join(map(repr, embedded()))} or the path of a "
            f"{SUFFIX} file"
        )
    raise ValueError(
        f"unknown checkpoint {name!r}; accepted: {', '.join(map(repr, embedded()))} "
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
    return {
        "prediction_type": prediction_type,
        "labels": tuple(labels),
        "sample_shape": (channels, height, width),
        "training": training,
    }


class _WithoutFirstValues(TorchFunctionMode):
    """Weights that get others at once are not drawn: to draw on the meta device PyTorch loads its
    compiler, a second and 140 MB.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def _build(config: UNetConfig, weights: dict[str, Tensor]) -> UNet:
    # every block has weights of its own, so that what is built is no larger than the file
    blocks = len(config.channel_multipliers) * config.blocks_per_level
    if blocks > len(weights):
        raise ValueError(f"it has {blocks} blocks, and the file {len(weights)} weights")
    with torch.device("meta"), _WithoutFirstValues():
        model = UNet(config)
    wanted = model.state_dict()
    for what, names in (
        ("lacks", sorted(set(wanted) - set(weights))),
        ("has beside them", sorted(set(weights) - set(wanted))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"of its weights the file {what} {', '.join(names[:3])}{more}")
    for key, weight in weights.items():
        if weight.shape != wanted[key].shape or not weight.is_floating_point():
            raise ValueError(
                f"{key} is {weight.dtype} {list(weight.shape)} in the file; accepted: "
                f"floating-point numbers {list(wanted[key].shape)}"
            )
    weights = {key: weight.to(torch.float32) for key, weight in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _card(path: Path) -> str:
    """The text beside a checkpoint; empty where there is none or it cannot be read."""
    beside = path.with_suffix(".md")
    try:
        return read_text(beside)
    except (ValueError, OSError):
        return ""
