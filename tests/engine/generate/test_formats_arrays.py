"""npz and npy: NumPy loads them, guided-diffusion's evaluator streams them, damage is named."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.engine.generate.formats_case import made, noise, write

from stepfuse.engine.generate.formats.format import decoded, npy_header, read_npy_header
from stepfuse.engine.generate.formats.npy import Npy
from stepfuse.engine.generate.formats.npz import Npz
from stepfuse.engine.generate.made import Made


def streamed(path: Path, name: str, batch: int) -> Iterator[NDArray[Any]]:
    """Batches of an array, read as the evaluators do: header, then numbers, never the whole."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)  # type: ignore[no-untyped-call]
        header = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
        shape, fortran_order, dtype = header
        assert not fortran_order
        assert not dtype.hasobject
        for start in range(0, shape[0], batch):
            rows = (min(batch, shape[0] - start), *shape[1:])
            data = file.read(int(np.prod(rows)) * dtype.itemsize)
            yield np.frombuffer(data, dtype).reshape(rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_evaluators_read_it(channels: int, tmp_path: Path) -> None:
    shape = (channels, 5, 7)
    images = made(Npz(), shape, 11, 6, label=-1)
    path = write(Npz(), tmp_path / "x.npz", images)
    expected = np.stack([np.broadcast_to(i.pixels, (5, 7, 3)) for i in images])
    with np.load(path, allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0", "arr_1"]
        assert loaded["arr_0"].dtype == np.uint8
        assert np.array_equal(loaded["arr_0"], expected)
        assert loaded["arr_1"].dtype == np.int64
        assert loaded["arr_1"].tolist() == [-1, 0, 1, 2, 3, 4]
    assert np.array_equal(np.concatenate(list(streamed(path, "arr_0", 4))), expected)


def test_the_zip_file_is_stored_and_has_no_time(tmp_path: Path) -> None:
    path = write(Npz(), tmp_path / "x.npz", made(Npz(), (3, 4, 4), 0, 2, label=0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = archive.infolist()
    assert [member.filename for member in members] == ["arr_0.npy", "arr_1.npy"]
    for member in members:
        assert member.compress_type == zipfile.ZIP_STORED
        assert member.date_time == (1980, 1, 1, 0, 0, 0)
        assert member.create_system == 3


def test_without_classes_there_are_no_labels(tmp_path: Path) -> None:
    path = write(Npz(), tmp_path / "x.npz", made(Npz(), (3, 4, 4), 0, 2))
    with np.load(path, allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0"]


def test_npy_is_loaded_and_mapped_with_any_number_of_channels(tmp_path: Path) -> None:
    for channels in (1, 2, 4, 16):
        random = np.random.default_rng(channels)
        samples = random.standard_normal((3, channels, 5, 2), dtype=np.float32)
        samples[1, 0, 0] = [np.nan, np.inf]
        images = [Made(n, sample) for n, sample in enumerate(samples)]
        path = write(Npy(), tmp_path / f"{channels}.npy", images)
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        assert mapped.dtype == np.float32
        assert mapped.shape == samples.shape
        assert mapped.tobytes() == samples.tobytes()
        found = [pixels for _, pixels in decoded(Npy(), path, 0, 3, (channels, 5, 2))]
        assert np.array_equal(np.stack(found), samples, equal_nan=True)


def test_what_are_no_samples_is_refused() -> None:
    with pytest.raises(TypeError, match="samples of image 4 must be float32; got float64"):
        Npy().encode(Made(4, np.zeros((1, 2, 2))))
    with pytest.raises(ValueError, match=r"image 4 must be \[C, H, W\]; got shape \(2, 2\)"):
        Npy().encode(Made(4, np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("shape", [(1,), (7, 3, 5, 2), (10**12, 1024, 1024, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["|u1", "<i8", "<f4"])
def test_the_header_is_what_numpy_reads_and_writes(shape: tuple[int, ...], dtype: str) -> None:
    header = npy_header(dtype, shape)
    assert len(header) % 64 == 0
    assert read_npy_header(io.BytesIO(header), dtype, len(shape)) == shape
    theirs = io.BytesIO()
    values = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(theirs, values)  # type: ignore[no-untyped-call]
    assert header.replace(b" ", b"") == _shortened(theirs.getvalue())


def _shortened(header: bytes) -> bytes:
    """A header of NumPy without spaces; its length, which counts them, is taken as ours."""
    text = header[10:].replace(b" ", b"")
    length = -(-(10 + len(header[10:].rstrip()) + 1) // 64) * 64 - 10
    return header[:8] + length.to_bytes(2, "little") + text


@pytest.mark.parametrize("output", [Npz(), Npy()], ids=["npz", "npy"])
def test_images_of_one_file_have_one_shape(output: Npz | Npy, tmp_path: Path) -> None:
    images = [*made(output, (3, 4, 4), 0, 2), *made(output, (3, 2, 8), 2, 1)]
    with pytest.raises(ValueError, match=r"one shape: .*; got .* for image 2"):
        write(output, tmp_path / "x", images)


def test_all_images_have_a_label_or_none(tmp_path: Path) -> None:
    images = [Made(n, noise((1, 2, 2), n), label) for n, label in enumerate((3, None))]
    with pytest.raises(ValueError, match="a label or none: image 0 has 3; got None for image 1"):
        write(Npz(), tmp_path / "x.npz", images)


def test_a_cut_off_npy_names_the_image(tmp_path: Path) -> None:
    shape = (2, 3, 5)
    images = [Made(n, np.full(shape, n, np.float32)) for n in range(60, 64)]
    path = write(Npy(), tmp_path / "x.npy", images)
    whole = path.read_bytes()
    for length in (0, 5, 9, 60, 128, 200, 128 + 120, 128 + 2 * 120, 128 + 4 * 120 - 1):
        path.write_bytes(whole[:length])
        n = 60 + max(0, length - 128) // 120
        with pytest.raises(ValueError, match=rf"x\.npy: image {n} cannot be read"):
            list(Npy().entries(path, 60))
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"x\.npy: image 63 cannot be read: .* goes on"):
        list(Npy().entries(path, 60))


def test_a_damaged_npz_names_the_image(tmp_path: Path) -> None:
    path = write(Npz(), tmp_path / "x.npz", made(Npz(), (3, 4, 4), 60, 4, label=0))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for read in (Npz().entries, Npz().labels):
            with pytest.raises(ValueError, match=r"x\.npz: image 60 .*cannot be read"):
                list(read(path, 60))
    at = whole.index(noise((3, 4, 4), 61).tobytes()) + 7
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    message = r"x\.npz: image 60 or one after it cannot be read: .*CRC-32"
    with pytest.raises(ValueError, match=message):
        list(Npz().entries(path, 60))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "image 0 cannot be read: .*arr_0.npy"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "image 0 .* 4 dimensions"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "image 0 .* got <f4"),
        ({"arr_0": np.zeros((2, 4, 4, 1), np.uint8)}, "image 0 .* 3 channels; got 1"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8).T}, "image 0 .* in Fortran order"),
    ],
)
def test_another_npz_is_refused(
    arrays: dict[str, NDArray[Any]], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        list(Npz().entries(tmp_path / "x.npz", 0))


def test_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"image 5 .* there are 2 images and 3 labels"):
        list(Npz().labels(tmp_path / "x.npz", 5))


def test_colours_are_no_grey(tmp_path: Path) -> None:
    path = write(Npz(), tmp_path / "x.npz", made(Npz(), (3, 4, 4), 0, 2))
    with pytest.raises(ValueError, match=r"image 0 .* must have 1 channels; got colours"):
        list(decoded(Npz(), path, 0, 2, (1, 4, 4)))
