"""Images encoded by processes beside the one that samples.

A GPU makes pictures faster than one core packs them, and a second thread is no help: packing a PNG
holds Python's lock.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from stepfuse.engine.generate.engines.start import Child, paths
from stepfuse.engine.generate.formats.format import Format
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.order import Order

_CHUNK_BYTES = 1 << 18  # of pixels that are sent at a time, or one image where that is more


class EncoderGone(RuntimeError):
    """A process that encodes has ended before it answered."""


class Encoders:
    """``count`` processes that encode for one format; they end with this process or by `end`."""

    def __init__(self, format: Format, count: int) -> None:
        order = Order("encode", paths(), (), 1, "cpu", {"format": format})
        self._children = [Child(order) for _ in range(count)]

    def encoded(self, images: Iterable[Made]) -> Iterator[tuple[Made, bytes]]:
        """The images with their bytes, in the order in which they come.

        Raises what `Format.encode` raises, and `EncoderGone`.
        """
        waiting: deque[tuple[Child, list[Made]]] = deque()  # each has been sent, and not answered
        try:
            for child, chunk in zip(itertools.cycle(self._children), _chunks(images), strict=False):
                if len(waiting) == len(self._children):
                    yield from _answer(*waiting.popleft())
                child.send(chunk)
                waiting.append((child, chunk))
            while waiting:
                yield from _answer(*waiting.popleft())
        finally:
            for child, _ in waiting:  # so that the next answer is to the next question
                child.heard()

    def end(self) -> None:
        """Let the processes end."""
        for child in self._children:
            child.end()


def _answer(child: Child, chunk: list[Made]) -> Iterator[tuple[Made, bytes]]:
    message = child.heard()
    if message is None:
        raise EncoderGone(f"a process that encodes images: {child.death()}")
    what, content = message
    if what == "raised":
        error: Exception = content
        raise error
    yield from zip(chunk, content, strict=True)


def _chunks(images: Iterable[Made]) -> Iterator[list[Made]]:
    chunk: list[Made] = []
    size = 0
    for image in images:
        chunk.append(image)
        size += image.pixels.nbytes
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
