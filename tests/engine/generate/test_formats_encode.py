"""Pictures: what Pillow makes of them elsewhere, what is lost, and what is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.engine.generate.formats_case import noise, smooth

from stepfuse.engine.generate.formats.encode import Encoder, Jpeg, Png, Webp
from stepfuse.engine.generate.made import Made

# more than float32 rounding in the colour transform and two roundings to whole numbers at quality
# 95: the largest error seen on smooth pictures is 4
JPEG_ERROR = 8

ENCODERS: list[Encoder] = [Png(), Webp(), Jpeg()]


def opened(encoded: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(encoded))
    picture.load()
    return picture


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.name)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_is_what_its_name_says(encoder: Encoder, channels: int) -> None:
    picture = opened(encoder.encode(Made(0, smooth((channels, 9, 16), 0))))
    assert picture.format == encoder.name.upper()
    assert picture.size == (16, 9)
    assert picture.mode == ("L" if channels == 1 and encoder.name != "webp" else "RGB")
    assert not picture.getexif()
    assert {"text", "exif", "icc_profile", "comment"} & picture.info.keys() == set()


def test_jpeg_keeps_the_colours_at_full_resolution() -> None:
    pixels = smooth((3, 16, 16), 0)
    pixels[:, ::2, 0], pixels[:, 1::2, 0] = 40, 160  # a red that changes from column to column
    encoded = Jpeg().encode(Made(0, pixels))
    layers: Any = opened(encoded).layer  # type: ignore[attr-defined]
    assert [layer[1:3] for layer in layers] == [(1, 1)] * 3
    assert np.abs(Jpeg().decode(encoded, (3, 16, 16)).astype(int) - pixels).max() <= 2 * JPEG_ERROR


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_loses_little(channels: int) -> None:
    shape = (channels, 21, 34)
    pixels = smooth(shape, 5)
    decoded = Jpeg().decode(Jpeg().encode(Made(0, pixels)), shape)
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).max() <= JPEG_ERROR


def test_options_change_the_size() -> None:
    made = Made(0, np.tile(smooth((3, 64, 64), 0) // 8, (2, 2, 1)))
    assert len(Png(9).encode(made)) < len(Png(1).encode(made)) < len(Png(0).encode(made))
    assert len(Jpeg(40).encode(made)) < len(Jpeg(95).encode(made))
    assert len(Webp(6).encode(made)) <= len(Webp(0).encode(made))


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.name)
def test_half_a_picture_is_refused(encoder: Encoder) -> None:
    encoded = encoder.encode(Made(0, noise((3, 40, 40), 0)))
    for length in (0, 7, 40, len(encoded) // 2, len(encoded) - 9):
        with pytest.raises(ValueError, match=r"no whole (PNG|WEBP|JPEG) picture|not whole"):
            encoder.decode(encoded[:length], (3, 40, 40))


def test_a_flipped_bit_of_a_png_is_found() -> None:
    encoded = Png(0).encode(Made(0, noise((3, 8, 8), 0)))
    for at in (20, 60, len(encoded) // 2, len(encoded) - 20):
        damaged = bytearray(encoded)
        damaged[at] ^= 4
        with pytest.raises(ValueError, match=r"no whole PNG picture|must be 8 x 8"):
            Png().decode(bytes(damaged), (3, 8, 8))


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.name)
def test_another_picture_is_refused(encoder: Encoder) -> None:
    encoded = encoder.encode(Made(0, noise((3, 4, 5), 0)))
    with pytest.raises(ValueError, match="must be 5 x 4; got 4 x 5"):
        encoder.decode(encoded, (3, 5, 4))
    with pytest.raises(ValueError, match="must have 1 channels; got colours"):
        encoder.decode(encoded, (1, 4, 5))
    for other in ENCODERS:
        if other.name != encoder.name:
            with pytest.raises(ValueError, match=r"no whole|not whole"):
                other.decode(encoded, (3, 4, 5))
    grey = encoder.encode(Made(0, noise((1, 4, 5), 0)))
    if encoder.name != "webp":
        with pytest.raises(ValueError, match="must have 3 channels; got 1 channels"):
            encoder.decode(grey, (3, 4, 5))


def test_a_palette_is_no_picture_of_ours() -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise((1, 4, 5), 0)[..., 0]).convert("P").save(buffer, "PNG")
    with pytest.raises(ValueError, match="grey or RGB; got mode P"):
        Png().decode(buffer.getvalue(), (1, 4, 5))


@pytest.mark.parametrize(("encoder", "side"), [(Webp(), 16384), (Jpeg(), 65501)])
def test_what_is_too_large_names_its_image(encoder: Encoder, side: int) -> None:
    with pytest.raises(ValueError, match=f"image 12, 1 x {side}, cannot be"):
        encoder.encode(Made(12, np.zeros((1, side, 1), np.uint8)))
