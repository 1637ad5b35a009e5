"""Pictures from samples, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepfuse.engine.files import images, writing


def grey(count: int, height: int = 2, width: int = 3) -> images.Pixels:
    """Images whose pixels all differ from image to image: image n is n + 1 everywhere."""
    values = np.arange(1, count + 1, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None], (count, height, width)).copy()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_the_scaling_of_training_images(dtype: torch.dtype) -> None:
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(u.to(dtype) / 127.5 - 1), u)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_to_uint8_clamps_and_rounds_halves_up(dtype: torch.dtype) -> None:
    x = torch.tensor([-float("inf"), -1.5, -1, 0, 1, 7, float("inf")], dtype=dtype)
    assert images.to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_to_uint8_rounds_to_the_nearest_value() -> None:
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    exact = 127.5 * (x + 1)
    assert (images.to_uint8(x).double() - exact).abs().max() <= 0.5


def test_to_uint8_refuses_nan_and_integers() -> None:
    x = torch.zeros(2, 1, 2, 2)
    x[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="2 of 8 values of the samples are NaN"):
        images.to_uint8(x)
    with pytest.raises(TypeError, match=r"floating-point.*torch.uint8"):
        images.to_uint8(torch.zeros(2, dtype=torch.uint8))


def test_to_pixels_moves_channels_last_and_drops_a_single_one() -> None:
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    pixels = images.to_pixels(x)
    assert pixels.shape == (2, 4, 5, 3)
    assert np.array_equal(pixels[1, 2, 3], images.to_uint8(x)[1, :, 2, 3].numpy())
    assert images.to_pixels(x[:, :1]).shape == (2, 4, 5)
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]; got shape \(3, 4, 5\)"):
        images.to_pixels(x[0])


def test_grid_puts_images_row_by_row() -> None:
    canvas = images.grid(grey(5), columns=3, padding=1, background=9)
    expected = np.full((2 * 3 + 1, 3 * 4 + 1), 9, dtype=np.uint8)
    for n, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        expected[1 + 3 * row : 3 + 3 * row, 1 + 4 * column : 4 + 4 * column] = n + 1
    assert np.array_equal(canvas, expected)


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (7, 3, 3), (64, 8, 8)]
)
def test_grid_is_about_square_by_default(count: int, rows: int, columns: int) -> None:
    assert images.grid(grey(count), padding=0).shape == (rows * 2, columns * 3)


def test_grid_of_colour_and_of_more_columns_than_images() -> None:
    colour = np.stack([grey(2), 2 * grey(2), 3 * grey(2)], axis=-1)
    canvas = images.grid(colour, columns=10, padding=0)
    assert canvas.shape == (2, 6, 3)
    assert canvas[0, 4].tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: images.grid(grey(2), columns=0), "columns must be at least 1; got 0"),
        (lambda: images.grid(grey(2), padding=-1), "padding must be at least 0; got -1"),
        (lambda: images.grid(grey(1)[0]), r"got shape \(2, 3\)"),
        (lambda: images.grid(np.zeros((2, 4, 4, 4), np.uint8)), r"3 \(RGB\); got 4"),
        (lambda: images.grid(grey(1)[:0]), r"got shape \(0, 2, 3\)"),
        (lambda: images.upscale(grey(1), 9), r"scale must be in 1 \.\. 8; got 9"),
        (lambda: images.film_strip(grey(2)), r"got shape \(2, 2, 3\)"),
        (lambda: images.frame_indices(0, 3), "at least 1; got 0 and 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def test_upscale_repeats_pixels() -> None:
    image = np.array([[[1, 2], [3, 4]]], dtype=np.uint8)
    assert images.upscale(image, 2)[0].tolist() == [
        [1, 1, 2, 2],
        [1, 1, 2, 2],
        [3, 3, 4, 4],
        [3, 3, 4, 4],
    ]


@pytest.mark.parametrize(("side", "scale"), [(8, 4), (16, 4), (28, 2), (32, 2), (64, 1), (256, 1)])
def test_small_images_are_enlarged_to_be_seen(side: int, scale: int) -> None:
    assert images.viewable_scale(side, side) == scale


def test_film_strip_has_a_row_per_image_and_time_to_the_right() -> None:
    frames = np.stack([grey(2, 1, 1) + 10 * f for f in range(3)]).astype(np.uint8)
    assert images.film_strip(frames, padding=0).tolist() == [[1, 11, 21], [2, 12, 22]]


def test_frame_indices_are_spaced_and_end_at_the_last_step() -> None:
    assert images.frame_indices(50, 10) == [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]
    for steps in range(1, 60):
        for limit in range(1, 12):
            chosen = images.frame_indices(steps, limit)
            assert len(chosen) == min(steps, limit)
            assert chosen == sorted(set(chosen))
            assert chosen[-1] == steps - 1


@pytest.mark.parametrize("colour", [False, True])
def test_png_keeps_pixels_and_text(tmp_path: Path, colour: bool) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 7, 3) if colour else (5, 7), dtype=np.uint8)
    images.save_png(tmp_path / "a.png", image, {"label": "Null für é"})
    with Image.open(tmp_path / "a.png") as read:
        assert read.mode == ("RGB" if colour else "L")
        assert read.text == {"label": "Null für é"}  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(read), image)


@pytest.mark.parametrize("colour", [False, True])
def test_gif_has_every_frame_and_holds_the_last(tmp_path: Path, colour: bool) -> None:
    frames = 60 * grey(4, 8, 8)
    frames = np.stack([frames] * 3, axis=-1) if colour else frames
    images.save_gif(tmp_path / "a.gif", frames, milliseconds=100, hold=1000)
    with Image.open(tmp_path / "a.gif") as read:
        assert read.n_frames == 4  # type: ignore[attr-defined]
        durations = []
        for f in range(4):
            read.seek(f)
            durations.append(read.info["duration"])
            assert np.asarray(read.convert("L")).tolist() == [[60 * (f + 1)] * 8] * 8
    assert durations == [100, 100, 100, 1000]


def test_gif_of_frames_too_short_for_viewers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="20 ms or more; got 5 and 2000"):
        images.save_gif(tmp_path / "a.gif", grey(2), milliseconds=5)
    assert names(tmp_path) == []


def test_npz_loads_without_pickle(tmp_path: Path) -> None:
    images.save_npz(tmp_path / "a.npz", images=grey(3), names=np.array(["x", "yz"]))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert np.array_equal(read["images"], grey(3))
        assert read["names"].tolist() == ["x", "yz"]
    with pytest.raises(TypeError, match="'names' holds Python objects"):
        images.save_npz(tmp_path / "b.npz", names=np.array([{}]))
    assert names(tmp_path) == ["a.npz"]


def test_folder_numbers_images_from_the_first_index(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    images.save_folder(folder, grey(2), first_index=999_999, texts=[{"label": "0"}, {"label": "1"}])
    assert names(folder) == ["1000000.png", "999999.png"]
    with Image.open(folder / "1000000.png") as read:
        assert np.array_equal(np.asarray(read), grey(2)[1])
        assert read.text == {"label": "1"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"one entry per image \(2\); got 1"):
        images.save_folder(tmp_path / "b", grey(2), texts=[{}])
    assert names(tmp_path) == ["out"]


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    writing.write_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        writing.write_file(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    with pytest.raises(OSError, match="No space left"):
        writing.write_folder(tmp_path / "out", [("a.png", b"")], ".png")
    assert names(tmp_path) == ["a.bin"]


def test_an_interrupted_folder_is_not_there(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, bytes]]:
        yield "a.png", b"a"
        raise KeyboardInterrupt

    writing.write_folder(tmp_path / "old", [("a.png", b"old")], ".png")
    for folder in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            writing.write_folder(tmp_path / folder, interrupted(), ".png", force=True)
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old" / "a.png").read_bytes() == b"old"


def test_a_folder_that_cannot_be_moved_in_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    writing.write_folder(folder, [("a.png", b"old")], ".png")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == folder and (source / "a.png").read_bytes() == b"new":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="not permitted"):
        writing.write_folder(folder, [("a.png", b"new")], ".png", force=True)
    assert names(tmp_path) == ["out"]
    assert (folder / "a.png").read_bytes() == b"old"


def test_force_replaces_pictures_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    writing.write_folder(folder, [("a.png", b"1"), ("b.png", b"2")], ".png")
    with pytest.raises(FileExistsError, match="is not empty; accepted"):
        writing.write_folder(folder, [("c.png", b"3")], ".png")
    writing.write_folder(folder, [("c.png", b"3")], ".png", force=True)
    assert names(folder) == ["c.png"]
    (folder / "thesis.tex").write_text("ten years")
    with pytest.raises(FileExistsError, match=r"holds 'thesis.tex', which is no .png file"):
        writing.write_folder(folder, [("d.png", b"4")], ".png", force=True)
    assert names(folder) == ["c.png", "thesis.tex"]
    assert names(tmp_path) == ["out"]


def test_what_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"folder .*/missing does not exist"):
        writing.check_file(tmp_path / "missing" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"folder .*/file is not a folder"):
        writing.check_folder(tmp_path / "file" / "out", ".png")
    with pytest.raises(NotADirectoryError, match="it is a file"):
        writing.check_folder(tmp_path / "file", ".png")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        writing.check_file(tmp_path)
    with pytest.raises(OSError, match="File name too long"):
        writing.check_file(tmp_path / ("x" * 300))
    writing.check_file(tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    writing.write_file(tmp_path / "mine", b"")
    assert (tmp_path / "mine").stat().st_mode == (tmp_path / "other").stat().st_mode
