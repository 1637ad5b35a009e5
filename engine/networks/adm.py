"""OpenAI's U-Net checkpoints (guided-diffusion, improved-diffusion) as a `UNet` of this project.

    unet = load_adm("256x256_diffusion_uncond.pt", "256x256_diffusion_uncond")
    eps_and_variance = unet(x, t)

The file is read without running code. Every weight of the file goes into one of the network, and
every one of the network comes from the file; what does not fit is an error with its name.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepfuse.engine.files.reading import NOT_THERE, check_regular, kind_of, reason
from stepfuse.engine.networks.adm_flags import PRESETS, ADMConfig, adm_config
from stepfuse.engine.networks.adm_names import LABELS, inferred, pairs
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.networks.unet_blocks import SelfAttention

__all__ = ["PRESETS", "ADMConfig", "adm_config", "load_adm"]

_NAMED = 4  # names in one message


def load_adm(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: str | Mapping[str, Any] | ADMConfig | None = None,
    *,
    head_channels: int | None = None,
    num_heads: int | None = None,
    new_attention_order: bool = False,
    dtype: torch.dtype = torch.float32,
) -> UNet:
    """The network of a checkpoint of OpenAI's ``UNetModel``, in evaluation mode.

    Args:
        source: a ``.safetensors`` or PyTorch file, or the state dict.
        config: a preset (`PRESETS`: "256x256_diffusion" and so on), the flags of their command line
            as a string or a mapping, or an `ADMConfig`. None reads the architecture off the names
            and shapes; only the heads leave no trace there:
        head_channels: width of an attention head (``--num_head_channels``), or
        num_heads: heads of every attention (``--num_heads``), where ``config`` is None.
        new_attention_order: as ``--use_new_attention_order``, where ``config`` is None.
        dtype: of the weights.

    Class-conditional networks get one class more than theirs, the null class, whose row is zero:
    they were not trained for it. Call ``unet(x, t, labels)`` with ``labels`` [N] otherwise.

    Raises ValueError for a file that is missing, truncated or something else, and for weights that
    are missing, left over or of another shape than the network's, with their names.
    """
    weights = _read(source)
    adm = _config(weights, config, head_channels, num_heads, new_attention_order)
    with torch.device("meta"):
        unet = UNet(adm.unet)
    expected = unet.state_dict()
    moved = {ours: theirs for theirs, ours in pairs(adm.unet) if ours in expected}
    _check_names(weights, moved, adm.unet)
    reordered = set() if adm.new_attention_order else _legacy(unet)
    state: dict[str, Tensor] = {}
    problems = []
    for ours, theirs in moved.items():
        weight = _laid_out(weights[theirs], expected[ours])
        if weight is None:
            shapes = tuple(weights[theirs].shape), tuple(expected[ours].shape)
            problems.append(f"{theirs} has shape {shapes[0]}; accepted: {shapes[1]}")
            continue
        module = ours.rpartition(".")[0]
        if module in reordered:
            heads = unet.get_submodule(module.rpartition(".")[0]).heads
            assert isinstance(heads, int)
            weight = _by_kind(weight, heads)
        state[ours] = weight.detach().to("cpu", dtype, copy=True).contiguous()
    if adm.unet.num_classes is not None:
        table = weights[LABELS]
        wanted = (adm.unet.num_classes, *expected["class_embedding.weight"].shape[1:])
        if tuple(table.shape) != wanted:
            problems.append(f"{LABELS} has shape {tuple(table.shape)}; accepted: {wanted}")
        else:
            null = table.new_zeros(1, table.shape[1])
            state["class_embedding.weight"] = torch.cat([table.detach(), null]).to("cpu", dtype)
    if problems:
        raise ValueError(_listed("weights of the wrong shape: ", problems))
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


def _config(
    weights: Mapping[str, Tensor],
    config: str | Mapping[str, Any] | ADMConfig | None,
    head_channels: int | None,
    num_heads: int | None,
    new_attention_order: bool,
) -> ADMConfig:
    if config is not None:
        if head_channels is not None or num_heads is not None or new_attention_order:
            raise ValueError(
                "config says how many heads and in which order: give it alone, or "
                "head_channels, num_heads and new_attention_order without it"
            )
        adm = config if isinstance(config, ADMConfig) else adm_config(config)
        # a checkpoint with another number of classes than ImageNet's is one of a user's own
        if adm.unet.num_classes is not None and LABELS in weights:
            adm = replace(adm, unet=replace(adm.unet, num_classes=int(weights[LABELS].shape[0])))
        return adm
    if (head_channels is None) == (num_heads is None):
        raise ValueError(
            "the weights do not say how many heads their attention has: give config (a preset: "
            f"{', '.join(PRESETS)}), head_channels (64 in most of these) or num_heads (4 in the "
            "others), one of them"
        )
    return ADMConfig(inferred(weights, head_channels, num_heads or 1), new_attention_order)


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict; ValueError for what is none."""
    if isinstance(source, Mapping):
        content: Any = source
    else:
        path = Path(source)
        if kind_of(path) == NOT_THERE:
            raise ValueError(f"{path} is not there; accepted: a .safetensors or PyTorch file")
        check_regular(path, "a .safetensors or PyTorch file")
        try:
            if path.suffix == ".safetensors":
                content = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (
            *(SafetensorError, OSError, EOFError, RuntimeError, ValueError),
            *(pickle.UnpicklingError, zipfile.BadZipFile),
        ) as error:
            raise ValueError(
                f"{path} is truncated or no file of weights: {reason(error)}"
            ) from None
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise ValueError(f"the checkpoint holds a {type(content).__name__}; accepted: a state dict")
    for name, weight in content.items():
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"{name!r} is a {type(weight).__name__}; accepted: a state dict of tensors"
            )
    return content


def _check_names(weights: Mapping[str, Tensor], moved: dict[str, str], config: UNetConfig) -> None:
    """ValueError unless the checkpoint has exactly the weights of the network."""
    wanted = set(moved.values())
    if config.num_classes is not None:
        wanted.add(LABELS)
    missing = sorted(wanted - set(weights))
    if missing:
        raise ValueError(_listed("the checkpoint lacks weights of the network: ", missing))
    extra = sorted(set(weights) - wanted)
    if extra:
        raise ValueError(_listed("the checkpoint has weights that the network has not: ", extra))


def _legacy(unet: UNet) -> set[str]:
    """The layers whose rows are ordered by head, then by queries, keys and values."""
    modules = unet.named_modules()
    return {f"{name}.qkv" for name, module in modules if isinstance(module, SelfAttention)}


def _by_kind(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads, 3, d] to rows [3, heads, d]."""
    rows = weight.reshape(heads, 3, -1, *weight.shape[1:])
    return rows.transpose(0, 1).reshape(weight.shape)


def _laid_out(weight: Tensor, like: Tensor) -> Tensor | None:
    """Their 1x1 convolution over positions is a linear layer here; None for another shape."""
    if weight.dim() == like.dim() + 1 and weight.shape[-1] == 1:
        weight = weight[..., 0]
    return weight if weight.shape == like.shape else None


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return what + "; ".join(names[:_NAMED]) + more
