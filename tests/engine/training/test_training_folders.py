"""Folders and archives of images: what is skipped is counted, what cannot be used is refused."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.training.picture_case import a_minute, png

from stepfuse.engine.training.data import ImageData, load_images
from stepfuse.engine.training.pictures import read_picture


def test_what_is_skipped_is_counted_and_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    for name in ("a.txt", "b.txt", "c.TXT", "README", ".DS_Store", "._a.png", "model.psd"):
        (tmp_path / name).write_text("no picture")
    os.mkfifo(tmp_path / "pipe")
    data = load_images(tmp_path)
    assert len(data) == 2
    (line,) = data.remarks
    assert line.startswith("8 files skipped: 3 .txt, 2 hidden, ")
    assert set(line.partition(": ")[2].split(", ")) == {
        "3 .txt", "2 hidden", "1 without a suffix", "1 .psd", "1 a named pipe",
    }  # fmt: skip


def test_what_is_skipped_in_classes_is_counted_together(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
        (tmp_path / name / "notes.md").write_text("")
    (tmp_path / ".cache").mkdir()
    data = load_images(tmp_path)
    assert data.class_names == ("ant", "bee")
    (line,) = data.remarks
    assert line.startswith("5 files skipped: ")
    assert set(line.partition(": ")[2].split(", ")) == {
        "2 .md", "2 folders in folders", "1 hidden",
    }  # fmt: skip


def test_an_empty_class_says_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.psd").write_text("")
    with pytest.raises(ValueError, match=r"no images in .*ant; accepted: .*; 1 file skipped: 1"):
        load_images(tmp_path)


def test_what_is_no_file_is_refused_by_its_kind(tmp_path: Path) -> None:
    def make(kind: str, path: Path) -> None:
        if kind == "a named pipe":
            os.mkfifo(path)
        elif kind == "a folder":
            path.mkdir()
        elif kind == "a symbolic link to nothing":
            path.symlink_to("nowhere")
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        else:
            # the path of a socket is short
            with socket.socket(socket.AF_UNIX) as server:
                os.chdir(path.parent)
                server.bind(path.name)

    here = Path.cwd()
    try:
        for n, kind in enumerate(
            ("a named pipe", "a folder", "a symbolic link to nothing", "a device", "a socket")
        ):
            folder = tmp_path / str(n)
            folder.mkdir()
            Image.new("L", (4, 4)).save(folder / "a.png")
            make(kind, folder / "x.png")
            with a_minute(), pytest.raises(ValueError, match=rf"x\.png is {kind}; accepted: a pic"):
                load_images(folder)
            with a_minute(), pytest.raises(ValueError, match=rf"x\.png is {kind}; accepted: a pic"):
                read_picture(folder / "x.png")
    finally:
        os.chdir(here)


def test_a_pipe_or_device_as_the_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    for path, kind in ((tmp_path / "a.npz", "a named pipe"), (Path("/dev/zero"), "a device")):
        with a_minute(), pytest.raises(ValueError, match=f"{path} is {kind}; accepted: a folder"):
            load_images(path)


def test_all_damaged_pictures_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    for n in range(5):
        (tmp_path / f"bad{n}.png").write_bytes(content[: 40 + n])
    with pytest.raises(ValueError, match=r"cannot read the image .*bad0\.png.*; and 2 more of 6"):
        load_images(tmp_path)


def test_every_cut_and_every_flipped_byte_is_an_error_or_a_picture(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    random = np.random.default_rng(1)
    for suffix in ("png", "jpg", "gif", "webp", "tif", "bmp", "ppm"):
        options = {"exif": exif} if suffix in ("png", "jpg", "webp", "tif") else {}
        path = tmp_path / f"a.{suffix}"
        image.save(path, **options)
        content = path.read_bytes()
        for _ in range(40):
            changed = bytearray(content[: random.integers(1, len(content) + 1)])
            changed[random.integers(len(changed))] ^= int(random.integers(1, 256))
            path.write_bytes(changed)
            with contextlib.suppress(ValueError):  # anything else fails the test
                assert read_picture(path).pixels.ndim == 3


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_picture_bomb_names_the_file(tmp_path: Path, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(png(header, bytes(1000)))
    with pytest.raises(ValueError, match=r"cannot read the image .*bomb\.png: Image size"):
        load_images(tmp_path)


def write_npz(path: Path, claimed: tuple[int, ...], content: bytes, descr: str = "|u1") -> None:
    """An archive whose ``images`` claims a shape."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {claimed}, }}"
    header = text.ljust(117).encode() + b"\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", npy)


@pytest.mark.parametrize("count", [10**6, 10**12, 10**30])
def test_an_archive_that_claims_more_than_it_holds(tmp_path: Path, count: int) -> None:
    write_npz(tmp_path / "a.npz", (count, 8, 8), bytes(640))
    with pytest.raises(ValueError, match=r"images\.npy is said to be uint8 .*, and holds"):
        load_images(tmp_path / "a.npz")


def test_an_archive_that_unpacks_to_more_than_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npz(tmp_path / "a.npz", (10**7, 1, 1), bytes(10**7))
    monkeypatch.setattr("stepfuse.kernels.limits.physical_memory", lambda: 10**6)
    with pytest.raises(ValueError, match=r"at least 0\.01 GB are needed, and this machine has"):
        load_images(tmp_path / "a.npz")


def test_more_pictures_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        Image.new("L", (64, 64)).save(tmp_path / f"{n}.png")
    monkeypatch.setattr("stepfuse.kernels.limits.physical_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="3 images of 64x64 with 1 channel cannot fit: at least"):
        load_images(tmp_path)


def test_no_hint_to_load_python_objects(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "a.npz", images=objects)
    buffer = io.BytesIO()
    np.save(buffer, objects, allow_pickle=True)
    (tmp_path / "b.npz").write_bytes(buffer.getvalue())
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match=r"not a readable \.npz file") as caught:
            load_images(tmp_path / name)
        assert "pickle" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_labels_without_names_make_no_more_classes_than_images(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 10**12]))
    with pytest.raises(ValueError, match=r"label 1000000000000 in .* makes 1000000000001 classes"):
        load_images(tmp_path / "a.npz")


def test_a_background_must_be_one_of_two(tmp_path: Path) -> None:
    background: Any = "green"
    with pytest.raises(ValueError, match="background is 'green'; accepted: 'white' or 'black'"):
        load_images(tmp_path, background)


def test_data_made_by_hand_has_no_remarks() -> None:
    data = ImageData(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), None, ())
    assert data.remarks == ()
