"""What formats share whose images are picture files."""

from __future__ import annotations

from typing import Any, ClassVar

from numpy.typing import NDArray

from stepfuse.engine.generate.formats.encode import Encoder
from stepfuse.engine.generate.formats.format import Shape, Takes
from stepfuse.engine.generate.made import Made


class Pictures:
    """Leaves to its ``encoder`` what is about one image."""

    takes: ClassVar[Takes] = "pixels"
    encoder: Encoder

    @property
    def name(self) -> str:
        """By which `choose` knows the format; the encoder's, unless it has one of its own."""
        return self.encoder.name

    def settings(self) -> dict[str, Any]:
        """Name and the encoder's options."""
        return {"name": self.name, **self.encoder.settings()}

    def libraries(self) -> dict[str, str]:
        """Those of the encoder."""
        return self.encoder.libraries()

    def check(self) -> None:
        """Nothing is missing: Pillow comes with this package."""

    def encode(self, made: Made) -> bytes:
        """The picture."""
        return self.encoder.encode(made)

    def decode(self, encoded: bytes, shape: Shape) -> NDArray[Any]:
        """The pixels [H, W, C]."""
        return self.encoder.decode(encoded, shape)
