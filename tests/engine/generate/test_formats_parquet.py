"""Parquet: pyarrow and `datasets` read it, row groups are bounded, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.generate.formats_case import made, noise, write

from stepfuse.engine.generate.formats import parquet as module
from stepfuse.engine.generate.formats.encode import Png, Webp
from stepfuse.engine.generate.formats.format import decoded
from stepfuse.engine.generate.formats.parquet import Parquet
from stepfuse.engine.generate.made import Made

pq: Any = pytest.importorskip("pyarrow.parquet", reason="format parquet needs pyarrow")
SHAPE = (3, 6, 5)


def test_the_columns_are_those_of_hugging_face(tmp_path: Path) -> None:
    images = [Made(8, noise(SHAPE, 0), 3, {"b": 1, "a": "é"}), Made(9, noise(SHAPE, 1), -1, {})]
    path = write(Parquet(Webp()), tmp_path / "x.parquet", images)
    table = pq.read_table(path)
    assert table.to_pylist() == [
        {
            "image": {"bytes": Webp().encode(images[0]), "path": "000000000008.webp"},
            "label": 3,
            "extra": '{"a":"é","b":1}',
        },
        {
            "image": {"bytes": Webp().encode(images[1]), "path": "000000000009.webp"},
            "label": None,
            "extra": None,
        },
    ]
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {
        "image": {"_type": "Image"},
        "label": {"dtype": "int64", "_type": "Value"},
        "extra": {"dtype": "string", "_type": "Value"},
    }


def test_without_classes_there_is_no_column_of_labels(tmp_path: Path) -> None:
    path = write(Parquet(), tmp_path / "x.parquet", made(Parquet(), SHAPE, 0, 2))
    schema = pq.read_schema(path)
    assert schema.names == ["image", "extra"]
    assert b"label" not in schema.metadata[b"huggingface"]


@pytest.mark.parametrize("channels", [1, 3])
def test_datasets_shows_images(channels: int, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    shape = (channels, 4, 9)
    files, images = [], []
    for first in (0, 3):  # two shards are one set
        part = made(Parquet(), shape, first, 3, label=first, seed=2)
        files.append(str(write(Parquet(), tmp_path / f"{first}.parquet", part)))
        images += part
    rows = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.features["image"] == datasets.Image()
    assert rows["label"][:] == [0, 1, 2, 3, 4, 5]
    for row, image in zip(rows, images, strict=True):
        pixels = np.asarray(row["image"]).reshape(4, 9, channels)
        assert np.array_equal(pixels, image.pixels)
        assert json.loads(row["extra"]) == {"seed": 2}


@pytest.mark.parametrize(
    ("rows", "size", "groups"),
    [(1000, 1 << 20, [7]), (3, 1 << 20, [3, 3, 1]), (1000, 1, [1] * 7), (1000, 600, [2, 2, 2, 1])],
)
def test_row_groups_are_bounded(
    rows: int, size: int, groups: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "BYTES", size)
    output = Parquet(Png(0))
    images = made(output, (3, 10, 12), 5, 7, label=0)
    assert {300 < len(output.encode(image)) < 600 for image in images} == {True}
    path = write(output, tmp_path / "x.parquet", images)
    metadata = pq.ParquetFile(path).metadata
    found = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert found == groups
    assert [n for n, _ in decoded(output, path, 5, 7, (3, 10, 12))] == list(range(5, 12))
    assert list(output.labels(path, 5)) == list(range(7))


def test_all_images_have_a_label_or_none(tmp_path: Path) -> None:
    images = [Made(n, noise((1, 2, 2), n), label) for n, label in enumerate((None, 3))]
    with pytest.raises(ValueError, match="image 1 has 3, others have none"):
        write(Parquet(), tmp_path / "x", images)
    with pytest.raises(ValueError, match="image 1 has None, others have one"):
        write(
            Parquet(), tmp_path / "y", [Made(0, noise((1, 2, 2), 0), 3), Made(1, noise(SHAPE, 0))]
        )


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    path = write(Parquet(), tmp_path / "x.parquet", made(Parquet(), SHAPE, 30, 4, label=0))
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for read in (Parquet().entries, Parquet().labels):
            message = r"x\.parquet: image 30 and those after it cannot be read"
            with pytest.raises(ValueError, match=message):
                list(read(path, 30))


def test_a_flipped_bit_names_its_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    images = made(Parquet(), SHAPE, 30, 5, label=0)
    path = write(Parquet(), tmp_path / "x.parquet", images)
    whole = path.read_bytes()
    for image, message in ((images[3], "image 32 and those up to 33"), (images[4], "image 34")):
        at = whole.index(Parquet().encode(image)) + 50
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        read = Parquet().entries(path, 30)
        assert [next(read)[0], next(read)[0]] == [30, 31]
        with pytest.raises(ValueError, match=rf"x\.parquet: {message} cannot be read: .*CRC"):
            list(read)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"other": [1]}, "image 3 cannot be read: None is in its place"),
        ({"image": [b"png"]}, "image 3 cannot be read: b'png' is in its place"),
        ({"image": [{"path": "000000000003.png"}]}, "image 3 cannot be read: .* in its place"),
        ({"image": [{"path": "3.png", "bytes": b""}]}, "image 3 cannot be read: '3.png' is in its"),
    ],
)
def test_another_parquet_file_is_refused(
    columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arrow = pytest.importorskip("pyarrow", reason="format parquet needs pyarrow")
    pq.write_table(arrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        list(Parquet().entries(tmp_path / "x.parquet", 3))


def test_labels_are_numbers(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="format parquet needs pyarrow")
    pq.write_table(arrow.table({"label": [3, None]}), tmp_path / "x.parquet")
    assert list(Parquet().labels(tmp_path / "x.parquet", 3)) == [3, -1]
    pq.write_table(arrow.table({"label": ["a", "b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="image 3 cannot be read: its label is 'a'"):
        list(Parquet().labels(tmp_path / "x.parquet", 3))
