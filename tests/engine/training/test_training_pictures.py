"""Every kind of picture becomes the pixels that are seen."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tests.engine.training.picture_case import png

from stepfuse.engine.training.data import load_images
from stepfuse.engine.training.pictures import read_picture

RED = (255, 0, 0)


def ramp_16() -> np.ndarray[Any, Any]:
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_grey_of_16_bits_keeps_every_level(tmp_path: Path, name: str) -> None:
    Image.fromarray(ramp_16()).save(tmp_path / name)
    data = load_images(tmp_path)
    assert data.images.dtype == torch.uint16
    assert data.sample_shape == (1, 256, 256)
    x0, _ = data.batch(torch.tensor([0]))
    expected = torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1
    # one rounding of float32 at 2
    torch.testing.assert_close(x0.double().flatten(), expected, rtol=0, atol=2**-23)
    assert x0.flatten().unique().numel() == 65536
    assert (float(x0.min()), float(x0.max())) == (-1, 1)


def test_big_endian_grey_of_16_bits(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (256, 256), ramp_16().astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    assert np.array_equal(read_picture(tmp_path / "a.tif").pixels[..., 0], ramp_16())


def test_one_picture_of_16_bits_makes_all_of_them_so(tmp_path: Path) -> None:
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(eight).save(tmp_path / "a.png")
    Image.fromarray(ramp_16()[:16, :16]).save(tmp_path / "b.png")
    Image.fromarray(eight).save(tmp_path / "c.png")
    x0, _ = load_images(tmp_path).batch(torch.arange(3))
    expected = torch.from_numpy(eight).double() / 127.5 - 1
    for n in (0, 2):
        torch.testing.assert_close(x0[n, 0].double(), expected, rtol=0, atol=2**-23)


def test_16_bits_in_an_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=ramp_16()[None])
    x0, _ = load_images(tmp_path / "a.npz").batch(torch.tensor([0]))
    assert x0.flatten().unique().numel() == 65536


def alpha_image(mode: str) -> Image.Image:
    """Four pixels: opaque, half, a quarter and nothing of red, or of grey 100."""
    alphas = np.array([[255, 128, 64, 0]], np.uint8)
    if mode == "LA":
        return Image.fromarray(np.stack([np.full((1, 4), 100, np.uint8), alphas], -1))
    colour = np.broadcast_to(np.array(RED, np.uint8), (1, 4, 3))
    return Image.fromarray(np.concatenate([colour, alphas[..., None]], -1))


@pytest.mark.parametrize(("background", "below"), [("white", 255), ("black", 0)])
def test_alpha_is_laid_on_the_background(tmp_path: Path, background: Any, below: int) -> None:
    for mode, colour in (("RGBA", RED), ("LA", (100,))):
        path = tmp_path / f"{mode}.png"
        alpha_image(mode).save(path)
        alpha = np.array([255, 128, 64, 0])[:, None] / 255
        expected = np.floor(alpha * np.array(colour) + (1 - alpha) * below + 0.5)
        picture = read_picture(path, background)
        assert picture.pixels.tolist() == [expected.tolist()]
        assert picture.remarks == (f"with transparency, laid on {background}",)


def transparent(path: Path, kind: str) -> None:
    """Two pixels of which the second is transparent."""
    if kind == "palette":
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, 0, 0, 255])
        image.putpixel((1, 0), 1)
        image.save(path, transparency=1)
    elif kind == "grey level":
        Image.fromarray(np.array([[7, 9]], np.uint8)).save(path, transparency=9)
    elif kind == "16-bit level":
        Image.fromarray(np.array([[7, 900]], np.uint16)).save(path, transparency=900)
    elif kind == "one bit":
        Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(path, transparency=255)
    else:
        pixels = np.array([[RED, (0, 255, 0)]], np.uint8)
        Image.fromarray(pixels).save(path, transparency=(0, 255, 0))


@pytest.mark.parametrize(
    ("kind", "first", "black"),
    [
        ("palette", list(RED), [0, 0, 0]),
        ("colour", list(RED), [0, 0, 0]),
        ("grey level", [7], [0]),
        ("16-bit level", [7], [0]),
        ("one bit", [0], [0]),
    ],
)
def test_a_transparent_colour_is_the_background(
    tmp_path: Path, kind: str, first: list[int], black: list[int]
) -> None:
    transparent(tmp_path / "a.png", kind)
    picture = read_picture(tmp_path / "a.png", "black")
    assert picture.pixels.tolist() == [[first, black]]
    assert "with transparency, laid on black" in picture.remarks
    white = read_picture(tmp_path / "a.png").pixels[0, 1]
    assert (white == (65535 if kind == "16-bit level" else 255)).all()


MODES = [
    ("1", "png", 1, [255]),
    ("L", "png", 1, [200]),
    ("P", "png", 3, [10, 20, 30]),
    ("RGB", "png", 3, [10, 20, 30]),
    ("CMYK", "tif", 3, [245, 235, 225]),
    ("YCbCr", "tif", 3, [10, 20, 30]),
    ("RGB", "bmp", 3, [10, 20, 30]),
    ("RGB", "gif", 3, [10, 20, 30]),
    ("RGB", "ppm", 3, [10, 20, 30]),
    ("L", "TIFF", 1, [200]),
]


@pytest.mark.parametrize(("mode", "suffix", "channels", "expected"), MODES)
def test_modes(tmp_path: Path, mode: str, suffix: str, channels: int, expected: Any) -> None:
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    if mode == "CMYK":
        image = Image.new("CMYK", (3, 2), (10, 20, 30, 0))
    elif mode in ("1", "L"):
        image = Image.new(mode, (3, 2), 200 if mode == "L" else 1)
    elif mode == "P":
        image = image.quantize(4)
    elif mode == "YCbCr":
        image = image.convert(mode)
        expected = image.convert("RGB").getpixel((0, 0))  # the way there and back rounds
    image.save(tmp_path / f"a.{suffix}")
    data = load_images(tmp_path)
    assert data.images.dtype == torch.uint8
    assert data.sample_shape == (channels, 2, 3)
    assert data.images[0, :, 0, 0].tolist() == list(expected)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "jfif", "webp"])
def test_lossy_files_are_read(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / f"a.{suffix}", quality=95)
    assert load_images(tmp_path).sample_shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_white_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif: its pixels are of the mode {mode}; accepted:"):
        load_images(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_orientation_is_applied(tmp_path: Path, mode: str, orientation: int) -> None:
    pixels = np.arange(6, dtype=np.uint16 if mode == "I;16" else np.uint8).reshape(2, 3)
    image = Image.fromarray(pixels if mode != "RGB" else np.stack([pixels] * 3, -1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.pixels[..., 0], upright[..., 0] if mode == "RGB" else upright)
    assert bool(picture.remarks) == (2 <= orientation <= 8)


def test_orientation_of_a_tiff_is_applied_once(tmp_path: Path) -> None:
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(
        tmp_path / "a.tif", tiffinfo={0x0112: 6}
    )
    assert read_picture(tmp_path / "a.tif").pixels[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_several(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    data = load_images(tmp_path)
    assert int(data.images.max()) == 0
    assert data.remarks == ("1 file with several frames or pages, of which the first is used",)


def test_colours_of_16_bits_are_read_as_8_and_said(tmp_path: Path) -> None:
    row = b"\x00" + struct.pack(">6H", 256, 512, 65535, 0, 25700, 770)
    (tmp_path / "a.png").write_bytes(png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), row))
    data = load_images(tmp_path)
    assert data.images[0].permute(1, 2, 0).tolist() == [[[1, 2, 255], [0, 100, 3]]]
    assert data.remarks == ("1 file of 16 bits a colour, read as 8",)
