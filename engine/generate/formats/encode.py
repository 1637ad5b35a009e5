"""Pixels as PNG, WebP or JPEG: one small frozen class each, with the options of its encoder.

None of them writes metadata: bytes are a function of the pixels, the options and the version of
the library that compresses.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

from stepfuse.engine.generate.formats.format import Shape, check_pixels
from stepfuse.engine.generate.made import Made

JPEG_QUALITY = 95
PNG_LEVEL = 6
WEBP_LEVEL = 0  # several times faster than PNG at 256 x 256, and of about its size


class Encoder(Protocol):
    """How the pixels of one image become the content of a picture file."""

    @property
    def name(self) -> str:
        """ "png", "webp" or "jpeg"."""

    @property
    def suffix(self) -> str:
        """The end of a file's name, ".png" say."""

    def settings(self) -> dict[str, Any]:
        """Name and options as JSON values."""

    def libraries(self) -> dict[str, str]:
        """The versions that the bytes depend on."""

    def encode(self, made: Made) -> bytes:
        """The content of the file. Pure and safe in threads."""

    def decode(self, encoded: bytes, shape: Shape) -> NDArray[np.uint8]:
        """The pixels [H, W, C]; ValueError for what is no whole picture of that shape."""


@dataclass(frozen=True)
class Png:
    """PNG; ``level`` of zlib, 0 (stored) to 9 (smallest)."""

    name: ClassVar[str] = "png"
    suffix: ClassVar[str] = ".png"
    level: int = PNG_LEVEL

    def __post_init__(self) -> None:
        _check_range("level of png", self.level, 0, 9)

    def settings(self) -> dict[str, Any]:
        """Name and level."""
        return {"image": self.name, "level": self.level}

    def libraries(self) -> dict[str, str]:
        """Pillow, which chooses the filters, and zlib or what stands in for it."""
        library = "zlib_ng" if features.check_feature("zlib_ng") else "zlib"
        version = features.version_feature("zlib_ng") or features.version_codec("zlib")
        return {"pillow": PIL.__version__, library: str(version)}

    def encode(self, made: Made) -> bytes:
        """Grey or RGB, 8 bits a channel."""
        return _saved(made, "PNG", compress_level=self.level)

    def decode(self, encoded: bytes, shape: Shape) -> NDArray[np.uint8]:
        """The pixels, exactly."""
        return _loaded(encoded, "PNG", shape)


@dataclass(frozen=True)
class Webp:
    """WebP without loss; ``level`` is libwebp's method, 0 (fast) to 6 (small). Grey becomes RGB."""

    name: ClassVar[str] = "webp"
    suffix: ClassVar[str] = ".webp"
    level: int = WEBP_LEVEL

    def __post_init__(self) -> None:
        _check_range("level of webp", self.level, 0, 6)

    def settings(self) -> dict[str, Any]:
        """Name and level."""
        return {"image": self.name, "level": self.level}

    def libraries(self) -> dict[str, str]:
        """Pillow and libwebp."""
        return {"pillow": PIL.__version__, "libwebp": str(features.version_module("webp"))}

    def encode(self, made: Made) -> bytes:
        """Lossless; at most 16383 pixels a side."""
        return _saved(made, "WEBP", lossless=True, quality=80, method=self.level)

    def decode(self, encoded: bytes, shape: Shape) -> NDArray[np.uint8]:
        """The pixels, exactly."""
        if len(encoded) < 8 or int.from_bytes(encoded[4:8], "little") + 8 != len(encoded):
            raise ValueError("the WebP picture is not whole")  # Pillow would fill it up
        return _loaded(encoded, "WEBP", shape)


@dataclass(frozen=True)
class Jpeg:
    """JPEG of a quality from 1 to 100, with the colours at full resolution (4:4:4)."""

    name: ClassVar[str] = "jpeg"
    suffix: ClassVar[str] = ".jpg"
    quality: int = JPEG_QUALITY

    def __post_init__(self) -> None:
        _check_range("quality of jpeg", self.quality, 1, 100)

    def settings(self) -> dict[str, Any]:
        """Name and quality."""
        return {"image": self.name, "quality": self.quality}

    def libraries(self) -> dict[str, str]:
        """Pillow and the JPEG library it was built with."""
        turbo = features.version_feature("libjpeg_turbo")
        library = "libjpeg_turbo" if turbo else "libjpeg"
        version = turbo or features.version_codec("jpg")
        return {"pillow": PIL.__version__, library: str(version)}

    def encode(self, made: Made) -> bytes:
        """Grey or YCbCr without subsampling; at most 65500 pixels a side."""
        return _saved(made, "JPEG", quality=self.quality, subsampling=0)

    def decode(self, encoded: bytes, shape: Shape) -> NDArray[np.uint8]:
        """About the pixels that were encoded."""
        return _loaded(encoded, "JPEG", shape)


ENCODERS = ("png", "webp", "jpeg")


def encoder_of(settings: Mapping[str, Any]) -> Encoder:
    """The encoder whose `settings` are among these."""
    name = settings.get("image")
    if name == Jpeg.name:
        return Jpeg(settings["quality"])
    if name == Png.name:
        return Png(settings["level"])
    if name == Webp.name:
        return Webp(settings["level"])
    raise ValueError(f"image must be one of {', '.join(ENCODERS)}; got {name!r}")


def _check_range(what: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} must be in {low} .. {high}; got {value!r}")


def _saved(made: Made, format: str, **options: Any) -> bytes:
    pixels = check_pixels(made)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format=format, **options)
    except (OSError, ValueError) as error:
        size = f"{picture.height} x {picture.width}"
        raise ValueError(f"image {made.n}, {size}, cannot be {format}: {error}") from error
    return buffer.getvalue()


def _loaded(encoded: bytes, format: str, shape: Shape) -> NDArray[np.uint8]:
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(encoded), formats=[format]) as picture:
            picture.verify()  # the check sums of PNG, which loading passes over
        with Image.open(io.BytesIO(encoded), formats=[format]) as picture:
            if picture.size != (width, height):  # before anything of that size is allocated
                found = f"{picture.height} x {picture.width}"
                raise ValueError(f"the picture must be {height} x {width}; got {found}")
            if picture.mode not in ("L", "RGB"):
                raise ValueError(f"the picture must be grey or RGB; got mode {picture.mode}")
            pixels: NDArray[np.uint8] = np.array(picture)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"this is no whole {format} picture: {error}") from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return folded(pixels, channels)


def folded(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """RGB of grey as one channel again. Raises ValueError for other channels than ``channels``."""
    found = pixels.shape[2]
    if found == channels:
        return pixels
    if channels == 1 and found == 3 and bool((pixels == pixels[..., :1]).all()):
        return pixels[..., :1]
    what = "colours" if channels == 1 and found == 3 else f"{found} channels"
    raise ValueError(f"the picture must have {channels} channels; got {what}")
