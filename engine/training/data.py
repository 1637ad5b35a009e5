"""Training images: a folder of pictures or an .npz file, kept as uint8 and scaled per batch."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class ImageData:
    """Images uint8 [N, C, H, W], labels int64 [N] or None, and the names of the classes."""

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The chosen images as float32 in [-1, 1], u / 127.5 - 1, and their labels."""
        x0 = self.images[indices].to(torch.float32) / 127.5 - 1
        return x0, None if self.labels is None else self.labels[indices]


def load_images(path: str | Path) -> ImageData:
    """Read a folder of pictures or an .npz file. Nothing is resized, padded or cropped.

    A folder holds pictures (labels None) or one folder of pictures per class (labels in the sorted
    order of the names). An .npz file holds ``images`` uint8 [N, H, W] or [N, H, W, C] and
    optionally ``labels`` integers [N] and ``class_names`` strings.

    Raises:
        FileNotFoundError: no such path.
        ValueError: nothing to read, differing sizes, wrong dtype or shape, labels out of range.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".npz":
        return _from_npz(path)
    raise ValueError(f"cannot read {path}; accepted: a folder of images or an .npz file")


def _from_npz(path: Path) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has arrays {sorted(arrays)}; it must have 'images'")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"images in {path} are {images.dtype} {list(images.shape)}; "
            "accepted: uint8 [N, H, W] or [N, H, W, C]"
        )
    if len(images) == 0:
        raise ValueError(f"{path} holds no images")
    if images.ndim == 3:
        images = images[..., None]
    labels = _checked_labels(arrays.get("labels"), len(images), path)
    classes = 0 if labels is None else int(labels.max()) + 1
    names = tuple(str(name) for name in arrays.get("class_names", np.arange(classes)))
    if len(names) < classes:
        raise ValueError(
            f"label {classes - 1} in {path} is out of range; class_names has {len(names)} entries"
        )
    return ImageData(_channels_first(images), labels, names if labels is not None else ())


def _checked_labels(labels: np.ndarray[Any, Any] | None, count: int, path: Path) -> Tensor | None:
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


def _from_folder(path: Path) -> ImageData:
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    loose = _pictures(path)
    if folders and loose:
        raise ValueError(f"{path} holds both images and folders; accepted: one or the other")
    groups = [_pictures(folder) for folder in folders] if folders else [loose]
    for group, folder in zip(groups, folders or [path], strict=True):
        if not group:
            raise ValueError(f"no images in {folder}; accepted: {', '.join(IMAGE_SUFFIXES)}")
    arrays: list[np.ndarray[Any, Any]] = []
    for file in (file for group in groups for file in group):
        array = _read_picture(file)
        if arrays and array.shape != arrays[0].shape:
            raise ValueError(
                f"{file} is {_describe(array)}, the images before it are {_describe(arrays[0])}; "
                "all must have one size and one number of channels"
            )
        arrays.append(array)
    labels = None
    if folders:
        sizes = torch.tensor([len(group) for group in groups])
        labels = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    names = tuple(folder.name for folder in folders)
    return ImageData(_channels_first(np.stack(arrays)), labels, names)


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def _read_picture(file: Path) -> np.ndarray[Any, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            grey = image.mode in ("1", "L", "LA", "I;16")
            array = np.asarray(image.convert("L" if grey else "RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read the image {file}: {error}") from None
    return array[..., None] if grey else array


def _describe(array: np.ndarray[Any, Any]) -> str:
    height, width, channels = array.shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


def _channels_first(images: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
