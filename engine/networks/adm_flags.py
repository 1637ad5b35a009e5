"""Networks of guided-diffusion and improved-diffusion, from the flags of their command lines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepfuse.engine.networks.unet import UNetConfig

CLASSES = 1000  # of ImageNet, which class_cond means

# the published models, as the README of guided-diffusion says how to run them
_SHARED = {
    "attention_resolutions": "32,16,8",
    "learn_sigma": True,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
_WIDE = {**_SHARED, "num_channels": 256, "num_head_channels": 64, "image_size": 256}
_LSUN = {**_WIDE, "dropout": 0.1, "noise_schedule": "linear"}
PRESETS: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {
        **_SHARED,
        "class_cond": True,
        "dropout": 0.1,
        "image_size": 64,
        "num_channels": 192,
        "num_head_channels": 64,
        "num_res_blocks": 3,
        "use_new_attention_order": True,
    },
    "128x128_diffusion": {
        **_SHARED,
        "class_cond": True,
        "image_size": 128,
        "num_channels": 256,
        "num_heads": 4,
    },
    "256x256_diffusion": {**_WIDE, "class_cond": True},
    "256x256_diffusion_uncond": _WIDE,
    "512x512_diffusion": {**_WIDE, "class_cond": True, "image_size": 512},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": {**_LSUN, "dropout": 0.0},
}

# what both command lines take where it is not given
_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
}
# flags that say nothing of the network's weights
_OTHERS = {
    *("use_checkpoint", "use_fp16", "diffusion_steps", "noise_schedule", "timestep_respacing"),
    *("use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas", "sigma_small"),
    *("batch_size", "num_samples", "use_ddim", "model_path", "classifier_path"),
    *("classifier_scale", "clip_denoised", "lr", "microbatch", "ema_rate"),
}
_MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
_WORDS = {"true": True, "t": True, "yes": True, "y": True, "1": True}
_WORDS |= {"false": False, "f": False, "no": False, "n": False, "0": False}


@dataclass(frozen=True)
class ADMConfig:
    """A network and how its checkpoint orders the rows of an attention's qkv.

    Attributes:
        unet: the network.
        new_attention_order: rows are all queries, then all keys, then all values, each by heads;
            otherwise, for each head, its queries, its keys and its values.
    """

    unet: UNetConfig
    new_attention_order: bool = False


def adm_config(flags: str | Mapping[str, Any]) -> ADMConfig:
    """The network of a preset, or of flags as guided-diffusion's and improved-diffusion's scripts
    take them: ``"--image_size 64 --num_channels 192 ..."`` or a mapping.

    Flags that are not given have the defaults of those scripts; those that do not change the
    network (``--noise_schedule``, ``--use_fp16`` and so on) are read over.

    Raises ValueError for an unknown preset, an unknown flag or a value that cannot be meant.
    """
    if isinstance(flags, str) and not flags.lstrip().startswith("-"):
        if flags not in PRESETS:
            raise ValueError(f"unknown preset {flags!r}; accepted: {', '.join(PRESETS)}, or flags")
        flags = PRESETS[flags]
    given = _parsed(flags) if isinstance(flags, str) else dict(flags)
    for name in given:
        if name not in _DEFAULTS and name not in _OTHERS:
            raise ValueError(f"unknown flag {name!r}; accepted: {', '.join(sorted(_DEFAULTS))}")
    values = {name: _typed(name, given.get(name, default)) for name, default in _DEFAULTS.items()}
    size, width, heads = values["image_size"], values["num_channels"], values["num_heads"]
    multipliers = _numbers("channel_mult", values["channel_mult"]) or _MULTIPLIERS.get(size)
    if multipliers is None:
        raise ValueError(f"image_size is {size}; accepted: {list(_MULTIPLIERS)} or a channel_mult")
    if values["num_heads_upsample"] not in (-1, heads):
        raise ValueError(
            f"num_heads_upsample is {values['num_heads_upsample']}; accepted: -1 or num_heads"
        )
    channels = [int(m * width) for m in multipliers]
    head_channels = None if values["num_head_channels"] == -1 else values["num_head_channels"]
    unet = UNetConfig(
        **network_options(channels, width),
        blocks_per_level=values["num_res_blocks"],
        attention_factors=_factors(size, values["attention_resolutions"], len(channels)),
        head_channels=head_channels,
        num_heads=heads if head_channels is None else 1,
        scale_shift=values["use_scale_shift_norm"],
        updown="resblock" if values["resblock_updown"] else "conv",
        num_classes=CLASSES if values["class_cond"] else None,
        dropout=values["dropout"],
        learned_variance=values["learn_sigma"],
    )
    return ADMConfig(unet, values["use_new_attention_order"])


def network_options(channels: list[int], embedding_features: int) -> dict[str, Any]:
    """The options that all of these networks share, and those of their widths.

    Raises ValueError where a level is not a multiple of the first.
    """
    base = channels[0]
    for width in channels:
        if base < 1 or width % base:
            raise ValueError(
                f"the levels have {channels} channels; accepted: multiples of the first"
            )
    return {
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in channels),
        "embedding_features": None if embedding_features == base else embedding_features,
        "embedding_order": "cos_sin",
        "norm_groups": 32,
        "norm_eps": 1e-5,
    }


def _parsed(text: str) -> dict[str, str]:
    words = shlex.split(text.replace("=", " "))
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ValueError(f"flags must be pairs of --name value; got {text!r}")
    return {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}


def _typed(name: str, value: Any) -> Any:
    """``value`` in the type of the flag's default."""
    kind = type(_DEFAULTS[name])
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        return _WORDS[str(value).lower()] if kind is bool else kind(value)
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"flag {name} is {value!r}; accepted: a {kind.__name__}") from None


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{name} is {text!r}; accepted: numbers with commas between") from None


def _factors(size: int, resolutions: str, levels: int) -> tuple[int, ...]:
    """Resolutions of attention as factors; one that no level has is left out, as they do."""
    wanted = _numbers("attention_resolutions", resolutions)
    factors = {size // int(resolution) for resolution in wanted if resolution >= 1}
    return tuple(sorted(f for f in factors if f in {2**level for level in range(levels)}))
