"""Training images: a folder of pictures or an .npz file, kept as integers and scaled per batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepfuse.engine.files.reading import NOT_THERE, check_regular, kind_of
from stepfuse.engine.training.archive import read_archive
from stepfuse.engine.training.pictures import BACKGROUNDS, SUFFIXES, Background, read_picture
from stepfuse.kernels.limits import check_memory

ACCEPTED = "a folder of images or an .npz file"
NAMED = 3  # damaged files that a message names; of more it gives the number
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ImageData:
    """Images and their classes.

    Attributes:
        images: uint8 or uint16 [N, C, H, W].
        labels: int64 [N] or None.
        class_names: one per class; empty without labels.
        remarks: what was skipped, and what was done to pictures on the way, a line each.
    """

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The chosen images as float32 in [-1, 1], and their labels.

        2 u / 255 - 1 for images of 8 bits, 2 u / 65535 - 1 for those of 16.
        """
        if self.images.dtype == torch.uint16:
            # not every version of PyTorch indexes unsigned integers
            chosen = self.images.view(torch.int16)[indices].view(torch.uint16)
            x0 = chosen.to(torch.float32) / 32767.5 - 1
        else:
            x0 = self.images[indices].to(torch.float32) / 127.5 - 1
        return x0, None if self.labels is None else self.labels[indices]


def load_images(path: str | Path, background: Background = "white") -> ImageData:
    """Read a folder of pictures or an .npz file. Nothing is resized, padded or cropped.

    A folder holds pictures (labels None) or one folder of pictures per class (labels in the sorted
    order of the names). `read_picture` says how a picture is read; where one has 16 bits, all do.
    Hidden files and files of other suffixes are skipped, and counted in ``remarks``.

    An .npz file holds ``images`` uint8 or uint16 [N, H, W] or [N, H, W, C] and optionally
    ``labels`` integers [N] and ``class_names`` strings.

    Args:
        path: of the folder or file.
        background: "white" or "black", on which transparent pictures are laid.

    Raises:
        FileNotFoundError: no such path.
        ValueError: nothing to read, damaged pictures, something with the name of a picture that is
            no file, differing sizes, wrong dtype or shape, labels out of range, more than fits into
            memory.
    """
    if background not in BACKGROUNDS:
        accepted = " or ".join(map(repr, BACKGROUNDS))
        raise ValueError(f"background is {background!r}; accepted: {accepted}")
    path = Path(path)
    kind = kind_of(path)
    if kind == NOT_THERE:
        raise FileNotFoundError(f"no such file or folder: {path}")
    try:
        if kind == "a folder":
            return _from_folder(path, background)
        if kind is None and path.suffix.lower() == ".npz":
            return _from_npz(path)
    except MemoryError:
        raise ValueError(
            f"{path} does not fit into memory; accepted: fewer or smaller images"
        ) from None
    if kind is not None:
        raise ValueError(f"{path} is {kind}; accepted: {ACCEPTED}")
    raise ValueError(f"cannot read {path}; accepted: {ACCEPTED}")


def _from_npz(path: Path) -> ImageData:
    arrays = read_archive(path)
    images = arrays["images"]
    if images.dtype not in (np.uint8, np.uint16) or images.ndim not in (3, 4):
        raise ValueError(
            f"images in {path} are {images.dtype} {list(images.shape)}; "
            "accepted: uint8 or uint16, [N, H, W] or [N, H, W, C]"
        )
    if images.size == 0:
        raise ValueError(f"{path} holds no images: its shape is {list(images.shape)}")
    if images.ndim == 3:
        images = images[..., None]
    labels = _checked_labels(arrays.get("labels"), len(images), path)
    classes = 0 if labels is None else int(labels.max()) + 1
    if "class_names" in arrays:
        names = tuple(str(name) for name in arrays["class_names"].reshape(-1))
    elif classes > len(images):
        raise ValueError(
            f"label {classes - 1} in {path} makes {classes} classes of {len(images)} images; "
            "accepted: labels 0 .. K - 1, or class_names"
        )
    else:
        names = tuple(map(str, range(classes)))
    if len(names) < classes:
        raise ValueError(
            f"label {classes - 1} in {path} is out of range; class_names has {len(names)} entries"
        )
    return ImageData(_channels_first(images), labels, names if labels is not None else ())


def _checked_labels(labels: Array | None, count: int, path: Path) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels in {path} are {labels.dtype} {list(labels.shape)}; "
            f"accepted: integers [{count}]"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} in {path} is out of range; accepted: 0 and up")
    return torch.from_numpy(labels.astype(np.int64))


def _from_folder(path: Path, background: Background) -> ImageData:
    skipped: Counter[str] = Counter()
    loose, folders = _sorted_out(path, skipped)
    if folders and loose:
        raise ValueError(f"{path} holds both images and folders; accepted: one or the other")
    groups = [loose]
    if folders:
        groups = []
        for folder in folders:
            pictures, deeper = _sorted_out(folder, skipped)
            skipped.update({"folders in folders": len(deeper)} if deeper else {})
            groups.append(pictures)
    for group, folder in zip(groups, folders or [path], strict=True):
        if not group:
            lost = f"; {_counted(skipped)}" if skipped else ""
            raise ValueError(f"no images in {folder}; accepted: {', '.join(SUFFIXES)}{lost}")
    images, remarks = _read_all([file for group in groups for file in group], background)
    if skipped:
        remarks.append(_counted(skipped))
    labels = None
    if folders:
        sizes = torch.tensor([len(group) for group in groups])
        labels = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    names = tuple(folder.name for folder in folders)
    return ImageData(_channels_first(images), labels, names, tuple(remarks))


def _sorted_out(folder: Path, skipped: Counter[str]) -> tuple[list[Path], list[Path]]:
    """Pictures and folders, by name. The rest is counted by what it is."""
    pictures, folders = [], []
    for entry in sorted(folder.iterdir()):
        suffix = entry.suffix.lower()
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif suffix in SUFFIXES:
            check_regular(entry, "a picture file by that name")
            pictures.append(entry)
        elif (kind := kind_of(entry)) == "a folder":
            folders.append(entry)
        else:
            skipped[kind or suffix or "without a suffix"] += 1
    return pictures, folders


def _read_all(files: list[Path], background: Background) -> tuple[Array, list[str]]:
    """[N, H, W, C] of all files, uint16 where one of them has 16 bits, and the remarks."""
    images: Array = np.empty(0)
    first = None
    counts: Counter[str] = Counter()
    damaged: list[str] = []
    for n, file in enumerate(files):
        try:
            picture = read_picture(file, background)
        except ValueError as error:
            damaged.append(str(error))
            continue
        pixels = picture.pixels
        if first is None:
            first = pixels
            what = f"{len(files)} images of {_describe(pixels)}"
            check_memory(what, len(files) * prod(pixels.shape) * pixels.itemsize)
            images = np.empty((len(files), *pixels.shape), pixels.dtype)
        if pixels.shape != first.shape:
            raise ValueError(
                f"{file} is {_describe(pixels)}, the images before it are {_describe(first)}; "
                "all must have one size and one number of channels"
            )
        if pixels.dtype == np.uint16 and images.dtype == np.uint8:
            check_memory(f"{len(files)} images of {_describe(pixels)}", 2 * images.nbytes)
            images = _sixteen_bits(images)
        images[n] = _sixteen_bits(pixels) if images.dtype == np.uint16 else pixels
        counts.update(picture.remarks)
    if damaged:
        more = len(damaged) - NAMED
        others = f"; and {more} more of {len(files)}" if more > 0 else ""
        raise ValueError("; ".join(damaged[:NAMED]) + others)
    return images, [f"{_files(number)} {remark}" for remark, number in counts.items()]


def _sixteen_bits(pixels: Array) -> Array:
    """The same brightness on a scale to 65535."""
    return pixels if pixels.dtype == np.uint16 else pixels.astype(np.uint16) * np.uint16(257)


def _counted(skipped: Counter[str]) -> str:
    """ "12 files skipped: 8 .txt, 4 hidden"."""
    parts = ", ".join(f"{number} {what}" for what, number in skipped.most_common())
    return f"{_files(skipped.total())} skipped: {parts}"


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"


def _describe(array: Array) -> str:
    height, width, channels = array.shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


def _channels_first(images: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
