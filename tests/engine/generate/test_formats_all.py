"""What every output format does: what goes in comes out, byte for byte the same file."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.engine.generate.formats_case import (
    CHOICES,
    EXACT,
    FIRST,
    PIXELS,
    SHAPES,
    chosen,
    content,
    encoded,
    made,
    noise,
    write,
)

from stepfuse.engine.generate import arrow as arrow_module
from stepfuse.engine.generate.formats import FORMATS, Format, choose, from_settings
from stepfuse.engine.generate.formats.format import Shape, decoded
from stepfuse.engine.generate.made import Made
from stepfuse.kernels.backends import BackendUnavailable


@pytest.fixture(params=CHOICES)
def output(request: pytest.FixtureRequest) -> Format:
    return chosen(request.param)


@pytest.mark.parametrize("choice", EXACT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 4])
def test_images_come_out_as_they_went_in(
    choice: str, shape: Shape, count: int, tmp_path: Path
) -> None:
    output = chosen(choice)
    images = made(output, shape, FIRST, count)
    path = write(output, tmp_path / f"x{output.ending}", images)
    found = list(decoded(output, path, FIRST, count, shape))
    assert [n for n, _ in found] == [image.n for image in images]
    for (_, pixels), image in zip(found, images, strict=True):
        assert pixels.dtype == image.pixels.dtype
        assert np.array_equal(pixels, image.pixels)
        assert pixels.flags.writeable
    assert [data for _, data in output.entries(path, FIRST)] == [output.encode(i) for i in images]


def test_labels_come_out_as_they_went_in(output: Format, tmp_path: Path) -> None:
    path = write(output, tmp_path / f"x{output.ending}", made(output, (3, 2, 3), 7, 4, label=-1))
    expected = [-1] * 4 if output.name == "npy" else [-1, 0, 1, 2]
    assert list(output.labels(path, 7)) == expected


def test_without_labels_every_class_is_none(output: Format, tmp_path: Path) -> None:
    path = write(output, tmp_path / f"x{output.ending}", made(output, (1, 2, 3), 0, 3))
    assert list(output.labels(path, 0)) == [-1, -1, -1]


def test_a_shard_is_a_function_of_its_images(output: Format, tmp_path: Path) -> None:
    images = made(output, (3, 5, 9), 3, 6, label=0, seed=5, name="é")
    turned = [Made(i.n, i.pixels, i.label, dict(reversed(i.extra.items()))) for i in images]
    (tmp_path / "elsewhere").mkdir()
    one = write(output, tmp_path / f"one{output.ending}", images)
    two = write(output, tmp_path / "elsewhere" / ".tmp", turned)
    assert content(one) == content(two)


def test_encoding_is_pure_and_safe_in_threads(output: Format) -> None:
    images = made(output, (3, 33, 31), 0, 24)
    before = [image.pixels.copy() for image in images]
    alone = [output.encode(image) for image in images]
    start = threading.Barrier(4)
    with ThreadPoolExecutor(4, initializer=start.wait) as pool:
        assert list(pool.map(output.encode, images * 4)) == alone * 4
    for image, pixels in zip(images, before, strict=True):
        assert np.array_equal(image.pixels, pixels)


def test_pixels_need_not_be_contiguous(output: Format) -> None:
    (image,) = made(output, (3, 6, 4), 0, 1)
    turned = Made(0, image.pixels[:, ::-1])
    copied = Made(0, image.pixels[:, ::-1].copy())
    assert output.encode(turned) == output.encode(copied)


def test_settings_are_json_and_make_the_same_format(output: Format) -> None:
    settings = output.settings()
    assert from_settings(json.loads(json.dumps(settings))) == output
    assert settings["name"] == output.name
    assert output.name in FORMATS
    assert all(isinstance(version, str) for version in output.libraries().values())


@pytest.mark.parametrize(
    ("count", "numbers", "message"),
    [
        (0, [], "count must be at least 1; got 0"),
        (3, [4, 5], "3 images were announced; got 2"),
        (1, [4, 5], "more than the 1 images announced: image 5"),
        (2, [4, 6], "expected 5; got 6"),
        (2, [4, 4], "expected 5; got 4"),
        (1, [], "1 images were announced; got 0"),
    ],
)
def test_a_shard_holds_what_was_announced(
    output: Format, count: int, numbers: list[int], message: str, tmp_path: Path
) -> None:
    (image,) = made(output, (1, 2, 2), 0, 1)
    images = [Made(n, image.pixels) for n in numbers]
    with pytest.raises(ValueError, match=message):
        output.write(tmp_path / "x", encoded(output, images), count)


def test_nothing_is_written_over(output: Format, tmp_path: Path) -> None:
    images = made(output, (1, 2, 2), 0, 1)
    path = write(output, tmp_path / "x", images)
    before = content(path)
    with pytest.raises(FileExistsError):
        write(output, path, images)
    assert content(path) == before


def test_other_images_are_missing(output: Format, tmp_path: Path) -> None:
    shape = (3, 4, 4)
    path = write(output, tmp_path / f"x{output.ending}", made(output, shape, 5, 3))
    with pytest.raises(ValueError, match=rf"x{output.ending}: image 8 is missing; .* be 9"):
        list(decoded(output, path, 5, 5, shape))
    with pytest.raises(ValueError, match=rf"x{output.ending}: holds image 7; .* be 6"):
        list(decoded(output, path, 5, 2, shape))
    with pytest.raises(ValueError, match=rf"x{output.ending}: image 5 cannot be read"):
        list(decoded(output, path, 5, 3, (3, 4, 5)))
    if output.name not in ("npz", "npy"):  # which have no numbers
        with pytest.raises(ValueError, match=rf"x{output.ending}: image 4 cannot be read"):
            list(decoded(output, path, 4, 3, shape))


def test_a_folder_without_the_shard_is_no_damage(output: Format, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(output.entries(tmp_path / "x", 0))
    with pytest.raises(FileNotFoundError):
        list(output.labels(tmp_path / "x", 0))


@pytest.mark.parametrize("choice", PIXELS)
def test_what_is_no_picture_is_refused(choice: str) -> None:
    output = chosen(choice)
    for channels in (2, 4):
        with pytest.raises(ValueError, match=rf"image 9: .*RGB\); got {channels}; format npy"):
            output.encode(Made(9, noise((channels, 3, 3), 0)))
    with pytest.raises(TypeError, match="image 9 must be uint8; got float32"):
        output.encode(Made(9, noise((3, 3, 3), 0).astype(np.float32)))
    with pytest.raises(ValueError, match=r"must be \[H, W, C\]; got shape \(3, 3\)"):
        output.encode(Made(9, noise((3, 3, 3), 0)[..., 0]))
    with pytest.raises(ValueError, match=r"got shape \(0, 3, 3\)"):
        output.encode(Made(9, noise((3, 3, 3), 0)[:0]))


@pytest.mark.parametrize("choice", ["webdataset", "png", "parquet"])
def test_extra_that_is_no_json_names_its_image(choice: str, tmp_path: Path) -> None:
    output = chosen(choice)
    images = [Made(3, noise((1, 2, 2), 0), 0, {"guidance": float("nan")})]
    with pytest.raises(ValueError, match="extra values of image 3 are not JSON"):
        write(output, tmp_path / "x", images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "zarr"}, "format must be one of webdataset, npz, png, .*; got 'zarr'"),
        ({"name": "webdataset", "image": "gif"}, "image must be one of png, webp, jpeg; got 'gif'"),
        ({"name": "npz", "image": "webp"}, "image 'webp' is for formats webdataset and parquet"),
        ({"name": "webp", "image": "jpeg"}, "format webp is a folder of webp files; got .*'jpeg'"),
        ({"name": "png", "quality": 80}, "quality 80 is for jpeg; got png"),
        ({"name": "npy", "level": 1}, "level 1 is for png and webp; got npy"),
        ({"name": "jpeg", "level": 1}, "level 1 is for png and webp; got jpeg"),
        ({"name": "jpeg", "quality": 101}, r"quality of jpeg must be in 1 \.\. 100; got 101"),
        ({"name": "png", "level": 10}, r"level of png must be in 0 \.\. 9; got 10"),
        ({"name": "webp", "level": 7}, r"level of webp must be in 0 \.\. 6; got 7"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "format must be one of .*; got None"),
        ({"name": "png"}, "image must be one of .*; got None"),
        ({"name": "png", "image": "png"}, "settings of format png lack 'level'"),
        ({"name": "npz", "level": 3}, "settings of format npz are .*; got"),
        ({"name": "png", "image": "jpeg", "quality": 95}, "settings of format png are .*; got"),
        ({"name": "webdataset", "image": "png", "level": True}, "must be in 0 .. 9; got True"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_settings(settings)


def test_a_missing_pyarrow_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(arrow_module.importlib, "import_module", missing)
    for name in FORMATS:
        if name != "parquet":
            choose(name).check()
    with pytest.raises(BackendUnavailable, match=r"pip install 'stepfuse\[parquet\]'"):
        choose("parquet").check()


@pytest.mark.parametrize("choice", ["webdataset", "npz", "npy", "png"])
def test_images_are_not_kept_while_they_are_written(choice: str, tmp_path: Path) -> None:
    """400 images of 48 kB and more, of which a few may be in memory at once."""
    output = chosen(choice)
    (image,) = made(output, (3, 128, 128), 0, 1, label=3)
    data = output.encode(image)

    def many() -> Iterator[tuple[Made, bytes]]:
        for n in range(400):
            yield Made(n, image.pixels, 3), bytes(bytearray(data))

    tracemalloc.start()
    try:
        output.write(tmp_path / "x", many(), 400)
        _, written = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in output.entries(tmp_path / "x", 0):
            pass
        _, read = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data) * 400 > 15e6
    assert written < 5e6
    assert read < 5e6
