"""Training images in an .npz file: its arrays, checked before memory is taken for them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from stepfuse.engine.files.reading import open_regular, reason
from stepfuse.kernels.limits import check_memory

NAMES = ("images", "labels", "class_names")
Array = np.ndarray[Any, Any]


def read_archive(path: Path) -> dict[str, Array]:
    """The arrays of these names in an .npz file; others are not read. Nothing is unpickled.

    Raises ValueError for a file that is none, has no ``images``, or unpacks to more than its
    headers say or than this machine holds; OSError where it may not be read.
    """
    with open_regular(path, "a folder of images or an .npz file") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {n.removesuffix(".npy"): archive.getinfo(n) for n in archive.namelist()}
                found = {name: members[name] for name in NAMES if name in members}
                check_memory(str(path), sum(member.file_size for member in found.values()))
                arrays = {name: _array(archive, member) for name, member in found.items()}
        except Exception as error:  # zipfile, zlib and numpy raise anything for a damaged file
            raise ValueError(f"{path} is not a readable .npz file: {reason(error)}") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has arrays {sorted(members)}; it must have 'images'")
    return arrays


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with archive.open(member) as file:
        shape, dtype = _header(file)
        size = dtype.itemsize
        for length in shape:  # whole numbers without a limit, which numpy's products are not
            size *= length
        if size > member.file_size:
            raise ValueError(
                f"{member.filename} is said to be {dtype} {list(shape)}, {size} bytes, and holds "
                f"{member.file_size}"
            )
    with archive.open(member) as file:
        array: Array = npy.read_array(file, allow_pickle=False)
    return array


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an .npy stream."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype
