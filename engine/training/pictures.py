"""One picture file as pixels: which files and modes are read, and how."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stepfuse.engine.files.reading import open_regular, reason

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
Background = Literal["white", "black"]
BACKGROUNDS: tuple[Background, ...] = ("white", "black")

# what a file of one of these suffixes may hold; nothing that starts another program, as EPS does
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM")
GREY = ("1", "L", "LA", "La")
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
ORIENTATION = 0x0112

FLATTENED = "with transparency, laid on {}"
TURNED = "turned upright as their EXIF data say"
FIRST = "with several frames or pages, of which the first is used"
REDUCED = "of 16 bits a colour, read as 8"
CONVERTED = "in CMYK, converted to RGB without a profile"


@dataclass(frozen=True)
class Picture:
    """Pixels uint8 or uint16 [H, W, C], C 1 or 3, and what was done to get them."""

    pixels: np.ndarray[Any, Any]
    remarks: tuple[str, ...]


def read_picture(file: Path, background: Background = "white") -> Picture:
    """Read a picture as it is seen, in its own size.

    Grey of 1, 8 or 16 bits, with or without alpha, becomes one channel; everything in colour three,
    palettes and CMYK too. Grey of 16 bits keeps its levels as uint16, colours of 16 bits come as 8.
    Transparency is laid on the background, in the values of the file:

        u = round(alpha u + (1 - alpha) background)

    The orientation in the EXIF data is applied. Of an animation or of several pages the first is
    taken. Colour profiles are not applied.

    Raises ValueError that names the file: no picture, damaged, larger than ``PIL`` allows for, of
    32 bits (which have no white to scale by), or no file at all (a folder, a named pipe).
    OSError where it may not be read.
    """
    from PIL import Image

    with open_regular(file, "a picture file") as stream:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of metadata that nothing here needs
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(stream, formats=FORMATS) as image:
                    return _decoded(image, background)
        except Exception as error:  # decoders raise anything for a damaged file
            raise ValueError(f"cannot read the image {file}: {reason(error)}") from None


def _decoded(image: Image, background: Background) -> Picture:
    several = bool(getattr(image, "is_animated", False))
    deep = any(";16" in str(part) for part in getattr(image, "tile", ()))
    image.load()
    pixels, transparent = _pixels(image, background)
    orientation = image.getexif().get(ORIENTATION, 1)
    turned = _upright(pixels, orientation)
    remarks = {
        FIRST: several,
        REDUCED: deep and pixels.dtype == np.uint8,
        CONVERTED: image.mode == "CMYK",
        FLATTENED.format(background): transparent,
        TURNED: turned is not pixels,
    }
    return Picture(turned, tuple(remark for remark, applies in remarks.items() if applies))


def _pixels(image: Image, background: Background) -> tuple[np.ndarray[Any, Any], bool]:
    """[H, W, C], and whether anything of the background is seen."""
    mode = image.mode
    # some readers give 16-bit grey as 32-bit integers
    if mode in GREY_16 or (mode == "I" and image.format in ("PNG", "PPM")):
        return _grey_16(image, background)
    if mode not in GREY + COLOUR:
        raise ValueError(
            f"its pixels are of the mode {mode}; accepted: grey of 1, 8 or 16 bits, RGB, CMYK, "
            "palettes"
        )
    grey = mode in GREY
    if mode not in WITH_ALPHA and "transparency" not in image.info:
        plain = np.asarray(image.convert("L" if grey else "RGB"))
        return plain[..., None] if grey else plain, False
    straight = image.convert("LA") if mode == "La" else image
    rgba = np.asarray(straight.convert("RGBA")).astype(np.uint32)
    colour, alpha = rgba[..., : 1 if grey else 3], rgba[..., 3:]
    below = 255 if background == "white" else 0
    mixed = (alpha * colour + (255 - alpha) * below + 127) // 255
    return mixed.astype(np.uint8), bool((alpha < 255).any())


def _grey_16(image: Image, background: Background) -> tuple[np.ndarray[Any, Any], bool]:
    grey = np.asarray(image).astype(np.uint16)
    level = image.info.get("transparency")
    clear = np.equal(grey, level) if isinstance(level, int) else np.zeros(grey.shape, bool)
    below = np.uint16(65535 if background == "white" else 0)
    return np.where(clear, below, grey)[..., None], bool(clear.any())


def _upright(pixels: np.ndarray[Any, Any], orientation: object) -> np.ndarray[Any, Any]:
    """[H, W, C] as it is to be seen, by the EXIF tag: 1 is upright, 6 was taken turned left."""
    if orientation == 2:
        return pixels[:, ::-1]
    if orientation == 3:
        return pixels[::-1, ::-1]
    if orientation == 4:
        return pixels[::-1]
    if orientation == 5:
        return pixels.swapaxes(0, 1)
    if orientation == 6:
        return pixels[::-1].swapaxes(0, 1)
    if orientation == 7:
        return pixels[::-1, ::-1].swapaxes(0, 1)
    if orientation == 8:
        return pixels[:, ::-1].swapaxes(0, 1)
    return pixels
