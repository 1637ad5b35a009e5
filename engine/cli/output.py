"""Where ``stepfuse sample`` writes: decided and checked before anything is sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepfuse.engine.files.writing import check_file, check_folder

Kind = Literal["png", "npz", "gif", "folder"]
STRIP_IMAGES, STRIP_FRAMES, GIF_FRAMES = 10, 10, 50


@dataclass(frozen=True)
class Target:
    """The file or folder of the images, and the film strip beside it where one is wanted."""

    path: Path
    kind: Kind
    strip: Path | None
    force: bool

    @classmethod
    def parse(cls, out: str, trajectory: bool, force: bool) -> Target:
        """The ending of ``out`` decides: .png, .npz, .gif; none, or a slash, is a folder.

        A GIF is the trajectory itself; otherwise ``trajectory`` adds NAME-trajectory.png.
        """
        path = Path(out)
        ending = path.suffix.lower()
        kinds: dict[str, Kind] = {".png": "png", ".npz": "npz", ".gif": "gif", "": "folder"}
        if out.endswith("/"):
            kind: Kind = "folder"
        elif not out or ending not in kinds:
            raise ValueError(
                f"--out must end in .png (grid), .npz, .gif (trajectory) or be a folder; "
                f"got {out!r}"
            )
        else:
            kind = kinds[ending]
        name = path.resolve().name if kind == "folder" else path.stem
        if not name:
            raise ValueError(f"--out must name a file or a folder; got {out!r}")
        strip = path.with_name(f"{name}-trajectory.png") if trajectory and kind != "gif" else None
        return cls(path, kind, strip, force)

    @property
    def frames(self) -> int:
        """How many steps of the trajectory are kept; 0 for none."""
        if self.kind == "gif":
            return GIF_FRAMES
        return STRIP_FRAMES if self.strip is not None else 0

    @property
    def needs_pictures(self) -> bool:
        """Whether the images must be grey or RGB."""
        return self.kind != "npz" or self.strip is not None

    def check(self) -> None:
        """Raise OSError with the reason where this cannot be written."""
        if self.kind == "folder":
            check_folder(self.path, ".png", force=self.force)
        else:
            check_file(self.path)
        if self.strip is not None:
            check_file(self.strip)


@dataclass(frozen=True)
class Drawn:
    """What was sampled.

    Attributes:
        pixels: uint8 [N, H, W] or [N, H, W, C].
        frames: the same with a leading axis of steps, or None.
        labels: class of each image, -1 for none; None where the model has no classes.
        class_names: of the model.
        first_index: number of the first image.
        settings: how to draw the same again.
    """

    pixels: Any
    frames: Any
    labels: list[int] | None
    class_names: tuple[str, ...]
    first_index: int
    settings: Mapping[str, Any]

    def text(self, n: int | None = None) -> dict[str, str]:
        """What goes into the PNG beside the pixels: settings, and the label of image n."""
        text = {"stepfuse": json.dumps(dict(self.settings))}
        if n is not None and self.labels is not None and self.labels[n] >= 0:
            text["label"] = self.class_names[self.labels[n]]
        return text


def write(target: Target, drawn: Drawn, scale: int | None, columns: int | None) -> list[Path]:
    """Write everything and return the paths; each is written whole or not at all.

    ``scale`` None enlarges small images in grids and trajectories, and none in folders.
    """
    import numpy as np

    from stepfuse.engine.files import images

    shown = scale or images.viewable_scale(*drawn.pixels.shape[1:3])
    if target.kind == "png":
        picture = images.grid(images.upscale(drawn.pixels, shown), columns)
        images.save_png(target.path, picture, drawn.text())
    elif target.kind == "gif":
        pictures = [images.grid(images.upscale(f, shown), columns) for f in drawn.frames]
        images.save_gif(target.path, np.stack(pictures))
    elif target.kind == "folder":
        images.save_folder(
            target.path,
            images.upscale(drawn.pixels, scale or 1),
            first_index=drawn.first_index,
            texts=[drawn.text(n) for n in range(len(drawn.pixels))],
            force=target.force,
        )
    else:
        arrays = {"images": drawn.pixels, "settings": np.array(drawn.text()["stepfuse"])}
        if drawn.labels is not None:
            arrays["labels"] = np.array(drawn.labels, dtype=np.int64)
            arrays["class_names"] = np.array(drawn.class_names)
        images.save_npz(target.path, **arrays)
    if target.strip is None:
        return [target.path]
    frames = np.stack([images.upscale(f[:STRIP_IMAGES], shown) for f in drawn.frames])
    images.save_png(target.strip, images.film_strip(frames), drawn.text())
    return [target.path, target.strip]
