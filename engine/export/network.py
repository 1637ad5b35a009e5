"""What is exported: a network with its example inputs, in one contract.

    output = network(x, t, *conditions)      x, output float32; t int64 [N]

Class labels are an explicit input: index ``num_classes`` stands for "no class".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import Optimized
from stepfuse.engine.export.metadata import Metadata
from stepfuse.engine.export.precisions import PRECISIONS
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.networks.unet import UNet
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.kernels.arguments import as_sizes
from stepfuse.kernels.checks import received

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.float16, torch.bfloat16), strict=True))
_DIFFUSERS_KEYS = ("in_channels", "sample_size", "block_out_channels")
_INPUTS = "(x, t) or (x, t, {name: tensor})"
TEXT_TOKENS = 77  # of CLIP, which Stable Diffusion's networks were trained with


@dataclass(frozen=True)
class Source:
    """A model with one example of every input, and what is known of it.

    ``condition`` holds tensors by name; ``constants`` are other keyword arguments of the model,
    which are frozen into the file.
    """

    model: nn.Module
    x: Tensor
    t: Tensor
    condition: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    metadata: Metadata
    size_divisor: int | None = None

    def with_batch(self, count: int) -> Source:
        """The same with ``count`` samples, repeating those of the example."""
        return replace(
            self,
            x=_spread(self.x, count),
            t=_spread(self.t, count),
            condition={name: _spread(value, count) for name, value in self.condition.items()},
        )

    @property
    def inputs(self) -> dict[str, Tensor]:
        """x, t and the condition by name, in the order of the file's inputs."""
        return {"x": self.x, "t": self.t, **self.condition}


class Network(nn.Module):
    """A model in the contract above, computing in ``precision``."""

    def __init__(self, source: Source, precision: str) -> None:
        super().__init__()
        self.source, self.precision, self.dtype = source, precision, DTYPES[precision]
        self.model = frozen_copy(source.model, self.dtype)
        self.names = list(source.condition)
        self._denoiser = Denoiser(self.model)

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """x [N, C, ...] float32, t int64 [N], conditions in their order -> float32 [N, C or 2C]."""
        named = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in zip(self.names, conditions, strict=True)
        }
        output = self._denoiser(x.to(self.dtype), t, {**named, **self.source.constants})
        return output.to(torch.float32)

    def promoted(self) -> Network:
        """The same weights, rounded as they are here, with float32 arithmetic."""
        if self.dtype is torch.float32:
            return self
        return Network(replace(self.source, model=self.model), "fp32")

    def named(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """`forward` with the condition by name, as a sampler calls it."""
        output: Tensor = self(x, t, *(condition[name] for name in self.names))
        return output


def describe(
    model: nn.Module | Checkpoint,
    example_inputs: Sequence[Any] | None,
    sample_shape: Sequence[int] | None,
    name: str = "model",
) -> Source:
    """The model below wrappers, with its inputs and what it says of itself.

    Raises TypeError for what is no network, ValueError where the inputs cannot be known.
    """
    known = Metadata()
    if isinstance(model, Checkpoint):
        known = Metadata(
            schedule=model.schedule,
            prediction_type=model.prediction_type,
            sample_shape=model.sample_shape,
            label_names=model.labels,
            normalization=model.normalization,
        )
        model = model.model
    if isinstance(model, Optimized):
        model = model.original
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} must be an nn.Module or a Checkpoint, sf.load('digits') say; "
            f"got {received(model)}"
        )
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise TypeError(f"example_inputs must be {_INPUTS}; got {received(example_inputs)}")
    shape = known.sample_shape
    if sample_shape is not None:
        shape = as_sizes("sample_shape", sample_shape)
        if len(shape) < 2:
            raise ValueError(f"sample_shape must be (C, H, W); got {shape}")
    if example_inputs is None:
        x, condition = _usual_inputs(model, shape)
        t, constants = torch.tensor([0]), dict[str, Any]()
    else:
        x, t, condition, constants = _given_inputs(model, example_inputs)
        if sample_shape is not None and shape != tuple(x.shape[1:]):
            raise ValueError(
                f"sample_shape must be that of example_inputs, {tuple(x.shape[1:])}; got {shape}"
            )
    classes = model.config.num_classes if isinstance(model, UNet) else None
    variance = "learned_range" if _learned_variance(model) else "fixed_small"
    known = replace(
        known,
        sample_shape=tuple(x.shape[1:]),
        variance_type=variance,
        num_classes=classes,
        label_input=None if classes is None else "labels",
    )
    return Source(model, x, t, condition, constants, known, _size_divisor(model))


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same network in evaluation mode, its floating-point weights in ``dtype``.

    The model itself is not touched; weights that have the dtype already are shared with the copy.
    """
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        kind = dtype if weight.is_floating_point() else weight.dtype
        memo[id(weight)] = nn.Parameter(weight.detach().to("cpu", kind), requires_grad=False)
    for buffer in model.buffers():
        kind = dtype if buffer.is_floating_point() else buffer.dtype
        memo[id(buffer)] = buffer.detach().to("cpu", kind)
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied.eval()


def _usual_inputs(
    model: nn.Module, shape: tuple[int, ...] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    if isinstance(model, UNet):
        if shape is None:
            raise ValueError("sample_shape=(C, H, W) is needed for a UNet; got None")
        labels = {} if model.config.num_classes is None else {"labels": torch.tensor([0])}
        return torch.randn(1, *shape), labels
    config = _diffusers_config(model)
    if config is None:
        raise ValueError(
            f"the inputs of a {type(model).__name__} are not known: give "
            "example_inputs=(x, t, {name: tensor})"
        )
    if shape is None:
        size = config["sample_size"]
        if size is None:
            raise ValueError("sample_shape=(C, H, W) is needed: the network names no sample_size")
        height, width = (size, size) if isinstance(size, int) else size
        shape = (int(config["in_channels"]), int(height), int(width))
    condition: dict[str, Tensor] = {}
    if "cross_attention_dim" in config:
        width = config["cross_attention_dim"]
        if config.get("addition_embed_type") is not None or not isinstance(width, int):
            raise ValueError(
                "a network with addition_embed_type or several cross_attention_dim needs "
                "example_inputs=(x, t, {name: tensor})"
            )
        text = config.get("encoder_hid_dim") or width
        condition["encoder_hidden_states"] = torch.randn(1, TEXT_TOKENS, text)
    if config.get("class_embed_type") not in (None, "identity"):
        raise ValueError(
            f"class_embed_type {config['class_embed_type']!r} needs "
            "example_inputs=(x, t, {'class_labels': tensor})"
        )
    if config.get("num_class_embeds") is not None:
        condition["class_labels"] = torch.tensor([0])
    return torch.randn(1, *shape), condition


def _given_inputs(
    model: nn.Module, example_inputs: Sequence[Any]
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
    args = list(example_inputs)
    named: dict[str, Any] = dict(args.pop()) if args and isinstance(args[-1], Mapping) else {}
    if isinstance(model, UNet) and len(args) == 3:
        named["labels"] = args.pop()
    if len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
        kinds = ", ".join(type(arg).__name__ for arg in example_inputs)
        raise TypeError(f"example_inputs must be {_INPUTS}; got ({kinds})")
    x, t = (arg.detach().to("cpu") for arg in args)
    if x.dim() < 2 or x.shape[0] == 0 or t.dim() > 1:
        raise ValueError(
            f"x must be [N, C, ...] and t [N]; got {tuple(x.shape)} and {tuple(t.shape)}"
        )
    if t.is_floating_point():
        raise TypeError(f"t must be int64, an index on the training schedule; got {t.dtype}")
    condition, constants = {}, {}
    for name, value in named.items():
        if isinstance(value, Tensor):
            if value.dim() == 0 or value.shape[0] != x.shape[0]:
                raise ValueError(
                    f"condition {name!r} must have one entry per sample ({x.shape[0]}); "
                    f"got shape {tuple(value.shape)}"
                )
            kind = torch.float32 if value.is_floating_point() else value.dtype
            condition[name] = value.detach().to("cpu", kind)
        elif value is None or isinstance(value, (bool, int, float, str)):
            constants[name] = value
        else:
            raise TypeError(
                f"condition {name!r} must be a tensor or a plain constant; "
                f"got {type(value).__name__}"
            )
    if isinstance(model, UNet) and model.config.num_classes is not None:
        constants.pop("labels", None)
        condition.setdefault("labels", torch.zeros(x.shape[0], dtype=torch.int64))
    if {"x", "t", "output"} & set(condition):
        raise ValueError(f"conditions may not be named x, t or output; got {sorted(condition)}")
    return x.to(torch.float32), t.reshape(-1).to(torch.int64), condition, constants


def _learned_variance(model: nn.Module) -> bool:
    if isinstance(model, UNet):
        return model.config.learned_variance
    config = _diffusers_config(model)
    return config is not None and config.get("out_channels") == 2 * config["in_channels"]


def _size_divisor(model: nn.Module) -> int | None:
    if isinstance(model, UNet):
        return model.config.size_divisor
    config = _diffusers_config(model)
    return None if config is None else int(2 ** (len(config["block_out_channels"]) - 1))


def _diffusers_config(model: nn.Module) -> Mapping[str, Any] | None:
    config = getattr(model, "config", None)
    if isinstance(config, Mapping) and all(key in config for key in _DIFFUSERS_KEYS):
        return config
    return None


def _spread(value: Tensor, count: int) -> Tensor:
    """``count`` entries, those given again and again."""
    return value[torch.arange(count) % value.shape[0]].clone()
