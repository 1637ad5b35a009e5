"""All shards as one npz for the evaluators, in as little memory for many images as for few."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests.engine.generate.formats_case import PIXELS, chosen, made, noise, write
from tests.engine.generate.test_formats_arrays import streamed

from stepfuse.engine.generate.formats import Format, choose
from stepfuse.engine.generate.formats.format import Shape
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.merge import Shard, merge_npz

COUNTS = (4, 4, 1)
FIRST = 100


def shards(
    output: Format, shape: Shape, folder: Path, label: int | None = None
) -> tuple[list[Shard], list[Made]]:
    """Three shards, the last of one image, and what is in them."""
    found: list[Shard] = []
    images: list[Made] = []
    for k, count in enumerate(COUNTS):
        first = FIRST + len(images)
        part = made(output, shape, first, count, None if label is None else label + len(images))
        path = write(output, folder / f"{k:06d}{output.ending}", part)
        found.append((path, first, count))
        images += part
    return found, images


@pytest.mark.parametrize("choice", PIXELS)
@pytest.mark.parametrize("shape", [(1, 5, 3), (3, 2, 7)], ids=str)
def test_shards_become_one_file(choice: str, shape: Shape, tmp_path: Path) -> None:
    output = chosen(choice)
    parts, images = shards(output, shape, tmp_path, label=-1)
    out = tmp_path / "all.npz"
    merge_npz(iter(parts), output, shape, out, labels=True)
    with np.load(out, allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0", "arr_1"]
        pixels, labels = loaded["arr_0"], loaded["arr_1"]
    assert pixels.dtype == np.uint8
    assert pixels.shape == (9, *shape[1:], 3)
    assert labels.dtype == np.int64
    assert labels.tolist() == [image.label for image in images]
    kept = [output.decode(output.encode(image), shape) for image in images]
    assert np.array_equal(pixels, np.stack([np.broadcast_to(k, pixels.shape[1:]) for k in kept]))
    assert np.array_equal(np.concatenate(list(streamed(out, "arr_0", 4))), pixels)


def test_the_same_images_are_the_same_bytes_whatever_they_were_in(tmp_path: Path) -> None:
    shape = (1, 4, 4)
    merged = {}
    for name in ("webdataset", "webp", "npz"):
        (tmp_path / name).mkdir()
        parts, images = shards(choose(name), shape, tmp_path / name, label=0)
        merge_npz(parts, choose(name), shape, tmp_path / f"{name}.npz", labels=True)
        merged[name] = (tmp_path / f"{name}.npz").read_bytes()
    assert merged["webdataset"] == merged["webp"] == merged["npz"]
    one = write(choose("npz"), tmp_path / "one.npz", images)
    assert one.read_bytes() == merged["npz"]  # a shard of all of them is the merged file


def test_without_labels_there_is_one_array(tmp_path: Path) -> None:
    parts, _ = shards(choose("webdataset"), (3, 2, 2), tmp_path, label=0)
    merge_npz(parts, choose("webdataset"), (3, 2, 2), tmp_path / "all.npz", labels=False)
    with np.load(tmp_path / "all.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0"]


def test_what_is_there_is_replaced_by_a_whole_file_alone(tmp_path: Path) -> None:
    output, shape, out = choose("webdataset"), (3, 8, 8), tmp_path / "all.npz"
    parts, _ = shards(output, shape, tmp_path)
    out.write_bytes(b"before")
    whole = parts[1][0].read_bytes()
    parts[1][0].write_bytes(whole[:2700])  # in the third image
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"000001\.tar: image 106 cannot be read: .*too early"):
        merge_npz(parts, output, shape, out, labels=False)
    assert out.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    parts[1][0].write_bytes(whole)
    merge_npz(parts, output, shape, out, labels=False)
    assert out.read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("choice", PIXELS)
def test_a_damaged_picture_names_file_and_image(choice: str, tmp_path: Path) -> None:
    output, shape = chosen(choice), (3, 8, 8)
    parts, images = shards(output, shape, tmp_path)
    path = parts[1][0]
    file = path / f"{105:012d}.{'jpg' if choice == 'jpeg' else choice}" if path.is_dir() else path
    whole, picture = file.read_bytes(), output.encode(images[5])
    at = whole.index(picture)
    file.write_bytes(whole[:at] + bytes(len(picture)) + whole[at + len(picture) :])
    named = {
        "npz": "image 104 or one after it",
        "parquet": "image 104 and those up to 107",
    }
    where = named.get(output.name, "image 105")
    with pytest.raises(ValueError, match=rf"000001.*: {where} cannot be read"):
        merge_npz(parts, output, shape, tmp_path / "all.npz", labels=False)


def test_shards_that_do_not_follow_each_other_are_refused(tmp_path: Path) -> None:
    output, shape, out = choose("npz"), (3, 2, 2), tmp_path / "all.npz"
    parts, _ = shards(output, shape, tmp_path)
    with pytest.raises(ValueError, match=r"000002\.npz begins with image 108; expected image 104"):
        merge_npz([parts[0], parts[2]], output, shape, out, labels=False)
    with pytest.raises(ValueError, match="at least 1 shard to merge; got none"):
        merge_npz([], output, shape, out, labels=False)
    with pytest.raises(ValueError, match=r"000001\.npz: image 108 is missing; .* be 108"):
        merge_npz([parts[0], (parts[1][0], 104, 5)], output, shape, out, labels=False)
    assert not out.exists()


def test_samples_and_other_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format npy holds samples"):
        merge_npz([], choose("npy"), (3, 2, 2), tmp_path / "all.npz", labels=False)
    with pytest.raises(ValueError, match=r"RGB\); got 4"):
        merge_npz([], choose("png"), (4, 2, 2), tmp_path / "all.npz", labels=False)


def test_labels_too_few_name_the_file(tmp_path: Path) -> None:
    output, shape = choose("png"), (1, 2, 2)
    parts, _ = shards(output, shape, tmp_path, label=0)
    metadata = parts[1][0] / "metadata.jsonl"
    metadata.write_bytes(b"".join(metadata.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(ValueError, match=r"000001: 4 images have a label; got 3 labels"):
        merge_npz(parts, output, shape, tmp_path / "all.npz", labels=True)


@pytest.mark.parametrize("name", ["webdataset", "npz", "webp"])
def test_memory_does_not_grow_with_the_images(name: str, tmp_path: Path) -> None:
    output, shape = choose(name), (3, 96, 96)
    pixels = noise(shape, 0)
    parts: list[Shard] = []
    for k in range(8):
        images = [Made(n, pixels, n) for n in range(80 * k, 80 * k + 80)]
        path = write(output, tmp_path / f"{k}{output.ending}", images)
        parts.append((path, 80 * k, 80))
    peaks = []
    for some in (parts[:1], parts[:2], parts):  # the first warms up what Pillow keeps
        tracemalloc.start()
        try:
            merge_npz(some, output, shape, tmp_path / "all.npz", labels=True)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (tmp_path / "all.npz").stat().st_size > 17e6
    assert peaks[2] < peaks[1] + 0.3e6
    assert peaks[2] < 5e6
