"""WebDataset: its own reader reads the shards, tar lists them, and damage is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.engine.generate.formats_case import FIRST, made, noise, write

from stepfuse.engine.generate.formats.encode import Jpeg, Webp
from stepfuse.engine.generate.formats.format import decoded
from stepfuse.engine.generate.formats.webdataset import WebDataset
from stepfuse.engine.generate.made import Made

SHAPE = (3, 9, 6)


def test_the_archive_is_plain_ustar(tmp_path: Path) -> None:
    images = [
        Made(FIRST, noise(SHAPE, 0), 12, {"label_name": "é", "seed": 3}),
        Made(FIRST + 1, noise(SHAPE, 1), -1, {}),
        Made(FIRST + 2, noise(SHAPE, 2), 0, {"guidance": None}),
    ]
    path = write(WebDataset(), tmp_path / "x.tar", images)
    with tarfile.open(path, "r:") as archive:
        members = archive.getmembers()
        found = {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
        assert archive.pax_headers == {}
    assert [member.name for member in members] == [
        "999999999998.png",
        "999999999998.cls",
        "999999999998.json",
        "999999999999.png",
        "1000000000000.png",
        "1000000000000.cls",
        "1000000000000.json",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert found["999999999998.cls"] == b"12"
    assert found["1000000000000.cls"] == b"0"
    assert found["999999999998.json"].decode() == '{"label_name":"é","seed":3}'
    with Image.open(io.BytesIO(found["1000000000000.png"])) as picture:
        assert np.array_equal(np.asarray(picture), images[2].pixels)
    assert path.read_bytes()[257:265] == b"ustar\x0000"
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


def test_small_numbers_have_twelve_digits(tmp_path: Path) -> None:
    path = write(WebDataset(Jpeg()), tmp_path / "x.tar", made(WebDataset(), SHAPE, 0, 2, label=5))
    with tarfile.open(path) as archive:
        assert archive.getnames() == [
            "000000000000.jpg",
            "000000000000.cls",
            "000000000001.jpg",
            "000000000001.cls",
        ]


@pytest.mark.parametrize("channels", [1, 3])
def test_webdataset_reads_it(channels: int, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset")
    shape = (channels, 5, 11)
    images = made(WebDataset(), shape, 0, 5, label=2, seed=7)
    path = write(WebDataset(), tmp_path / "x.tar", images)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{n:012d}" for n in range(5)]
    for sample, image in zip(samples, images, strict=True):
        pixels = np.asarray(sample["png"])[..., :1] if channels == 1 else np.asarray(sample["png"])
        assert np.array_equal(pixels, image.pixels)
        assert sample["cls"] == image.label
        assert sample["json"] == {"seed": 7}


def test_extras_come_out_as_they_went_in(tmp_path: Path) -> None:
    images = [Made(0, noise(SHAPE, 0), 1, {"a": [1, None]}), Made(1, noise(SHAPE, 1), 1, {})]
    path = write(WebDataset(), tmp_path / "x.tar", images)
    assert list(WebDataset().extras(path, 0)) == [{"a": [1, None]}, {}]
    assert json.dumps(list(WebDataset().extras(path, 0)))


@pytest.mark.parametrize("labelled", [True, False])
def test_wherever_a_shard_is_cut_off_the_image_is_named(labelled: bool, tmp_path: Path) -> None:
    output = WebDataset(Webp())
    images = made(output, (1, 3, 3), 40, 3, label=0 if labelled else None)
    path = write(output, tmp_path / "x.tar", images)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        ends = [member.offset_data + 512 for member in archive.getmembers()]
    each = 2 if labelled else 1
    for length in range(0, ends[-1] + 1024, 256):
        path.write_bytes(whole[:length])
        last = 40 + sum(end <= length for end in ends) // each  # the first that is not there
        with pytest.raises(ValueError, match=r"x\.tar: image \d+.* cannot be read: .*") as raised:
            list(decoded(output, path, 40, 3, (1, 3, 3)))
        if length < ends[-1]:
            assert f"image {last}" in str(raised.value)


def test_damage_names_the_image(tmp_path: Path) -> None:
    output = WebDataset()
    path = write(output, tmp_path / "x.tar", made(output, SHAPE, 40, 4, label=0))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        members = {member.name: member for member in archive.getmembers()}

    def damage(at: int, new: bytes) -> None:
        path.write_bytes(whole[:at] + new + whole[at + len(new) :])

    damage(members["000000000042.png"].offset_data + 60, b"\x00\xff\x00\xff")
    with pytest.raises(ValueError, match="image 42 cannot be read: this is no whole PNG"):
        list(decoded(output, path, 40, 4, SHAPE))
    damage(members["000000000042.png"].offset + 2, b"9")  # the sum of the header is wrong now
    with pytest.raises(ValueError, match=r"image 42, or what .* beside image 41, .* checksum"):
        list(output.entries(path, 40))
    damage(members["000000000043.cls"].offset_data, b"x")
    with pytest.raises(ValueError, match="image 43 cannot be read: its class is b'x'"):
        list(output.labels(path, 40))


def test_what_is_in_the_place_of_an_image_is_named(tmp_path: Path) -> None:
    output = WebDataset()
    path = tmp_path / "x.tar"
    for names, message in (
        (["000000000003.png", "000000000005.png"], "image 4 .* '000000000005.png' is in its"),
        (["000000000003.png", "000000000004.cls"], "image 3 .* '000000000004.cls' is in its"),
        (["README"], "image 3 .*'README' is in its place"),
        (["000000000003.jpg"], "image 3 .*'000000000003.jpg' is in its place"),
    ):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name))
        with pytest.raises(ValueError, match=message):
            list(output.entries(path, 3))
