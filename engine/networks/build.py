"""A network from its configuration and its weights, which are compared before it is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepfuse.engine.networks.unet import UNet, UNetConfig


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


def build(config: UNetConfig, weights: dict[str, Tensor]) -> UNet:
    """The network with these weights, float32, in evaluation mode, without gradients.

    ValueError for weights that are not those of its configuration.
    """
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
