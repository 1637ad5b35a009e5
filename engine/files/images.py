"""Pictures: from samples in [-1, 1] to PNG, GIF and npz files.

Arrays of pixels are uint8 [N, H, W] (grey) or [N, H, W, C]. Every file is written whole or not at
all, see ``stepfuse.engine.files.writing``.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from stepfuse.engine.files.writing import write_file, write_folder
from stepfuse.kernels.arguments import check_literal

Pixels = NDArray[np.uint8]
Rounding = Literal["nearest", "truncate"]

PADDING = 2
BACKGROUND = 64
VIEWABLE = 64
MAX_SCALE = 8


def to_uint8(x: Tensor, rounding: Rounding = "nearest", low: float = -1.0) -> Tensor:
    """Samples in [low, 1] to pixel values, uint8 of the same shape:

        u = floor(255 (clamp(x, low, 1) - low) / (1 - low) + 1/2)      "nearest"
        u = floor(255 (clamp(x, low, 1) - low) / (1 - low))            "truncate"

    so that low is 0, 1 is 255 and a half is rounded up; with the usual low, -1, it inverts
    u / 127.5 - 1. Truncated is how guided-diffusion (ADM) writes its samples, half a grey level
    darker. Infinities are clamped. Raises TypeError for integers and ValueError for NaN.
    """
    check_literal("rounding", rounding, Rounding)
    if not x.is_floating_point():
        raise TypeError(f"samples must be of a floating-point type in [{low:g}, 1]; got {x.dtype}")
    missing = int(x.isnan().sum())
    if missing:
        raise ValueError(f"{missing} of {x.numel()} values of the samples are NaN")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    grey = 255 / (1 - low) * (x.clamp(low, 1) - low)
    return (grey + 0.5 if rounding == "nearest" else grey).floor().to(torch.uint8)


def to_pixels(x: Tensor, low: float = -1.0) -> Pixels:
    """Samples [N, C, H, W] in [low, 1] as pixels: [N, H, W] for one channel, else [N, H, W, C]."""
    if x.dim() != 4:
        raise ValueError(f"samples must be [N, C, H, W]; got shape {tuple(x.shape)}")
    pixels: Pixels = to_uint8(x, low=low).movedim(1, -1).cpu().contiguous().numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def upscale(images: Pixels, factor: int) -> Pixels:
    """Every pixel of [N, H, W] or [N, H, W, C] as a square of ``factor`` by ``factor``."""
    if not 1 <= factor <= MAX_SCALE:
        raise ValueError(f"scale must be in 1 .. {MAX_SCALE}; got {factor}")
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def viewable_scale(height: int, width: int) -> int:
    """The ``upscale`` factor, 1 to 4, that brings small images to about 64 pixels a side."""
    return min(4, max(1, VIEWABLE // max(height, width)))


def grid(
    images: Pixels,
    columns: int | None = None,
    padding: int = PADDING,
    background: int = BACKGROUND,
) -> Pixels:
    """N images as one picture, row by row, with ``padding`` between and around them.

    Args:
        images: [N, H, W] or [N, H, W, 3].
        columns: images in a row; by default the rows and columns are about as many.
        padding: pixels.
        background: value of padding and of cells without an image.

    Returns [rows (H + padding) + padding, columns (W + padding) + padding] or the same with 3
    channels.
    """
    _check_drawable(images)
    count, height, width = images.shape[:3]
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    if padding < 0:
        raise ValueError(f"padding must be at least 0; got {padding}")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = (rows * (height + padding) + padding, columns * (width + padding) + padding)
    canvas: Pixels = np.full((*size, *images.shape[3:]), background, dtype=np.uint8)
    for i, image in enumerate(images):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        canvas[top : top + height, left : left + width] = image
    return canvas


def film_strip(frames: Pixels, padding: int = PADDING, background: int = BACKGROUND) -> Pixels:
    """Frames [F, N, H, W] or [F, N, H, W, 3] as one picture: a row per image, time to the right."""
    if frames.ndim not in (4, 5) or 0 in frames.shape:
        raise ValueError(
            f"frames must be [F, N, H, W] or [F, N, H, W, 3]; got shape {frames.shape}"
        )
    by_image = frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:])
    return grid(by_image, len(frames), padding, background)


def frame_indices(steps: int, limit: int) -> list[int]:
    """At most ``limit`` of ``steps`` steps, evenly spaced, the last one always among them."""
    if min(steps, limit) < 1:
        raise ValueError(f"steps and limit must be at least 1; got {steps} and {limit}")
    if limit == 1:
        return [steps - 1]
    count = min(steps, limit)
    return sorted({round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)} | {steps - 1})


def save_png(
    path: str | os.PathLike[str], image: Pixels, text: Mapping[str, str] | None = None
) -> None:
    """Write one picture, [H, W] or [H, W, 3]; ``text`` becomes the PNG's text entries."""
    write_file(path, encode_png(image, text))


def encode_png(image: Pixels, text: Mapping[str, str] | None = None) -> bytes:
    """The content of a PNG file."""
    _check_drawable(image[None])
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_folder(
    path: str | os.PathLike[str],
    images: Pixels,
    *,
    first_index: int = 0,
    texts: Sequence[Mapping[str, str]] | None = None,
    force: bool = False,
) -> None:
    """Write every image of [N, H, W] or [N, H, W, 3] as PNG into a new or empty folder.

    Image n is called by the number first_index + n, six digits wide or more: 000000.png. ``texts``
    has one mapping per image, see ``save_png``; for ``force`` see ``files.write_folder``.
    """
    _check_drawable(images)
    if texts is not None and len(texts) != len(images):
        raise ValueError(f"texts must have one entry per image ({len(images)}); got {len(texts)}")

    def files() -> Iterator[tuple[str, bytes]]:
        for n, image in enumerate(images):
            text = None if texts is None else texts[n]
            yield f"{first_index + n:06d}.png", encode_png(image, text)

    write_folder(path, files(), ".png", force=force)


def save_npz(path: str | os.PathLike[str], **arrays: NDArray[Any]) -> None:
    """Write named arrays, compressed; no objects, so that they load with ``allow_pickle=False``."""
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {name!r} holds Python objects; accepted: numbers and strings")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_file(path, buffer.getvalue())


def save_gif(
    path: str | os.PathLike[str],
    frames: Pixels,
    milliseconds: int = 80,
    hold: int = 2000,
) -> None:
    """Write frames [F, H, W] or [F, H, W, 3] as an endless GIF, the last one shown for ``hold``.

    Times are in milliseconds; viewers round them to hundredths of a second.
    """
    _check_drawable(frames)
    if min(milliseconds, hold) < 20:
        raise ValueError(f"frames must last 20 ms or more; got {milliseconds} and {hold}")
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [hold]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
    )
    write_file(path, buffer.getvalue())


def check_channels(channels: int) -> None:
    """Raise ValueError for images that no picture file can hold."""
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 channel (grey) or 3 (RGB); got {channels}")


def _check_drawable(images: Pixels) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"pixels must be uint8; got {images.dtype}")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W] or [N, H, W, 3]; got shape {images.shape}")
    check_channels(1 if images.ndim == 3 else images.shape[3])
