"""Reading training images, and what is said about those that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepfuse.engine.training.data import load_images


def write_picture(path: Path, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 200 if mode == "L" else (0, 128, 255)).save(path)


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/b.jpg", "ant/c.png"):
        write_picture(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = load_images(tmp_path)
    assert data.class_names == ("ant", "cat")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    assert data.sample_shape == (3, 6, 8)
    x0, labels = data.batch(torch.tensor([2, 0]))
    assert labels is not None
    assert labels.tolist() == [1, 0]
    expected = torch.tensor([0.0, 128.0, 255.0]) / 127.5 - 1
    torch.testing.assert_close(x0[1, :, 0, 0], expected)


def test_a_flat_folder_has_no_labels_and_grey_stays_grey(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", mode="L")
    data = load_images(tmp_path)
    assert data.labels is None
    assert data.sample_shape == (1, 6, 8)


def bad_data(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "data.npz"
    good = np.zeros((3, 8, 8), dtype=np.uint8)
    if kind == "missing":
        return tmp_path / "nowhere"
    if kind == "empty folder":
        (tmp_path / "empty").mkdir()
        return tmp_path / "empty"
    if kind == "mixed sizes":
        write_picture(tmp_path / "mixed/a.png")
        write_picture(tmp_path / "mixed/b.png", size=(9, 6))
        return tmp_path / "mixed"
    if kind == "mixed levels":
        write_picture(tmp_path / "both/a.png")
        write_picture(tmp_path / "both/c/b.png")
        return tmp_path / "both"
    if kind == "broken image":
        write_picture(tmp_path / "broken/a.png")
        (tmp_path / "broken/b.png").write_bytes(b"\x89PNG nothing")
        return tmp_path / "broken"
    if kind == "text":
        (tmp_path / "data.txt").write_text("hello")
        return tmp_path / "data.txt"
    if kind == "broken archive":
        path.write_bytes(b"PK\x03\x04 nothing")
        return path
    arrays: dict[str, dict[str, Any]] = {
        "no images": {"pictures": good},
        "float": {"images": good.astype(np.float32)},
        "no entries": {"images": good[:0]},
        "label count": {"images": good, "labels": np.zeros(2, dtype=np.int64)},
        "negative label": {"images": good, "labels": np.array([0, -1, 1])},
        "large label": {"images": good, "labels": np.array([0, 5, 1]), "class_names": ["a", "b"]},
    }
    np.savez(path, **arrays[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file or folder: .*nowhere"),
        ("empty folder", "no images in .*empty; accepted: .png"),
        ("mixed sizes", "b.png is 9x6 with 3 channels, the images before it are 8x6"),
        ("mixed levels", "holds both images and folders"),
        ("broken image", "cannot read the image .*b.png"),
        ("text", "data.txt; accepted: a folder of images or an .npz file"),
        ("broken archive", "not a readable .npz file"),
        ("no images", r"has arrays \['pictures'\]; it must have 'images'"),
        ("float", r"float32 \[3, 8, 8\]; accepted: uint8"),
        ("no entries", "holds no images"),
        ("label count", r"int64 \[2\]; accepted: integers \[3\]"),
        ("negative label", "label -1 in .* is out of range"),
        ("large label", "label 5 in .* is out of range; class_names has 2 entries"),
    ],
)
def test_unusable_data_says_why(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_images(bad_data(tmp_path, kind))
