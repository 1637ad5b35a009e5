"""Output formats by name.

webdataset       tar files of pictures, classes and JSON
npz              the arrays of guided-diffusion's evaluators
png, webp, jpeg  folders of pictures
parquet          pictures for `datasets` of Hugging Face; needs pyarrow
npy              float32 samples, not pictures
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stepfuse.engine.generate.formats.encode import (
    ENCODERS,
    JPEG_QUALITY,
    PNG_LEVEL,
    WEBP_LEVEL,
    encoder_of,
)
from stepfuse.engine.generate.formats.folder import Folder
from stepfuse.engine.generate.formats.format import Format, decoded
from stepfuse.engine.generate.formats.npy import Npy
from stepfuse.engine.generate.formats.npz import Npz
from stepfuse.engine.generate.formats.parquet import Parquet
from stepfuse.engine.generate.formats.webdataset import WebDataset

__all__ = ["FORMATS", "IMAGES", "Format", "choose", "decoded", "from_settings"]

FORMATS = ("webdataset", "npz", *ENCODERS, "parquet", "npy")
IMAGES = ENCODERS  # what `choose` takes for ``image``

_HOLDING_PICTURES = (WebDataset.name, Parquet.name)
_LEVELS = {"png": PNG_LEVEL, "webp": WEBP_LEVEL}


def choose(
    name: str, image: str = "png", quality: int = JPEG_QUALITY, level: int | None = None
) -> Format:
    """The format of that name with these options.

    Args:
        name: one of FORMATS.
        image: one of IMAGES: the pictures inside webdataset and parquet.
        quality: of JPEG, 1 to 100.
        level: how hard PNG (0 to 9) and WebP (0 to 6) try to be small; by default 6 and 0.

    Raises ValueError for unknown names, values out of range and options that would do nothing.
    """
    _known("format", name, FORMATS)
    _known("image", image, IMAGES)
    inside = image if name in _HOLDING_PICTURES else name if name in ENCODERS else None
    if inside is None and image != "png":
        raise ValueError(f"image {image!r} is for formats {_listed(_HOLDING_PICTURES)}; got {name}")
    if name in ENCODERS and image not in ("png", name):
        raise ValueError(f"format {name} is a folder of {name} files; got image {image!r}")
    if quality != JPEG_QUALITY and inside != "jpeg":
        raise ValueError(f"quality {quality!r} is for jpeg; got {inside or name}")
    if level is not None and inside not in _LEVELS:
        raise ValueError(f"level {level!r} is for {_listed(_LEVELS)}; got {inside or name}")
    settings: dict[str, Any] = {"name": name}
    if inside == "jpeg":
        settings |= {"image": inside, "quality": quality}
    elif inside is not None:
        settings |= {"image": inside, "level": _LEVELS[inside] if level is None else level}
    return from_settings(settings)


def from_settings(settings: Mapping[str, Any]) -> Format:
    """The format whose `settings` these are.

    Raises ValueError for what no format's settings can be, settings too many or missing included.
    """
    name = _known("format", settings.get("name"), FORMATS)
    try:
        made = _made(name, settings)
    except KeyError as error:
        raise ValueError(f"the settings of format {name} lack {error}") from None
    if made.settings() != dict(settings):
        raise ValueError(f"the settings of format {name} are {made.settings()}; got {settings}")
    return made


def _made(name: str, settings: Mapping[str, Any]) -> Format:
    if name == Npz.name:
        return Npz()
    if name == Npy.name:
        return Npy()
    encoder = encoder_of(settings)
    if name == WebDataset.name:
        return WebDataset(encoder)
    if name == Parquet.name:
        return Parquet(encoder)
    return Folder(encoder)


def _known(what: str, name: object, accepted: tuple[str, ...]) -> str:
    if not isinstance(name, str) or name not in accepted:
        raise ValueError(f"{what} must be one of {', '.join(accepted)}; got {name!r}")
    return name


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)
