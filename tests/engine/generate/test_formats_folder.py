"""Folders of pictures: what is in them, beside the pictures too, and what does not belong there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.engine.generate.formats_case import made, noise, write

from stepfuse.engine.generate.formats import choose
from stepfuse.engine.generate.formats.encode import Png
from stepfuse.engine.generate.formats.folder import METADATA, Folder
from stepfuse.engine.generate.formats.format import decoded
from stepfuse.engine.generate.made import Made

SHAPE = (3, 6, 5)


@pytest.mark.parametrize(("name", "suffix"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
def test_pictures_are_named_by_their_numbers(name: str, suffix: str, tmp_path: Path) -> None:
    output = choose(name)
    assert output.ending == ""
    path = write(output, tmp_path / "000007", made(output, SHAPE, 70, 2))
    assert sorted(file.name for file in path.iterdir()) == [
        f"000000000070.{suffix}",
        f"000000000071.{suffix}",
    ]
    with Image.open(path / f"000000000071.{suffix}") as picture:
        assert picture.size == (5, 6)


def test_labels_and_extra_are_beside_them(tmp_path: Path) -> None:
    images = [
        Made(8, noise(SHAPE, 0), None, {}),
        Made(9, noise(SHAPE, 1), 3, {"seed": 1}),
        Made(10, noise(SHAPE, 2), -1, {}),
    ]
    path = write(Folder(Png()), tmp_path / "x", images)
    lines = (path / METADATA).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": "000000000008.png", "label": None, "extra": {}},
        {"file_name": "000000000009.png", "label": 3, "extra": {"seed": 1}},
        {"file_name": "000000000010.png", "label": None, "extra": {}},
    ]
    assert list(Folder(Png()).labels(path, 8)) == [-1, 3, -1]


def test_datasets_reads_a_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    images = made(Folder(Png()), SHAPE, 0, 3, label=1, seed=5)
    path = write(Folder(Png()), tmp_path / "x", images)
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(rows) == 3
    for row, image in zip(rows, images, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image.pixels)
        assert row["label"] == image.label
        assert row["extra"] == {"seed": 5}


def test_what_does_not_belong_there_is_named(tmp_path: Path) -> None:
    output = Folder(Png())
    path = write(output, tmp_path / "x", made(output, SHAPE, 70, 4, label=0))
    (path / "Thumbs.db").touch()
    with pytest.raises(ValueError, match=r"x: image 70 .* 'Thumbs.db' is in its place"):
        list(output.entries(path, 70))
    (path / "Thumbs.db").unlink()
    (path / "000000000071.png").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"x: image 71 .* '000000000072.png' is in its place"):
        list(output.entries(path, 70))
    with pytest.raises(ValueError, match=r"x: image 71"):
        list(decoded(output, path, 70, 4, SHAPE))
    (path / "000000000071.png").write_bytes((tmp_path / "gone").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"x: image 71 cannot be read: this is no whole PNG"):
        list(decoded(output, path, 70, 4, SHAPE))


@pytest.mark.parametrize(
    ("lines", "n"),
    [
        (['{"file_name": "000000000071.png", "label": 3}'], 70),
        (['{"file_name": "000000000070.png", "label": 3}', "{"], 71),
        (['{"file_name": "000000000070.png", "label": 3}', "[]"], 71),
        (['{"file_name": "000000000070.png"}'], 70),
        (['{"file_name": "000000000070.png", "label": "three"}'], 70),
    ],
)
def test_damaged_metadata_names_the_image(lines: list[str], n: int, tmp_path: Path) -> None:
    output = Folder(Png())
    path = write(output, tmp_path / "x", made(output, SHAPE, 70, 2))
    (path / METADATA).write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"metadata\.jsonl: image {n} cannot be read: its line"):
        list(output.labels(path, 70))
