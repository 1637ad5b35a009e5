"""Files of pictures that no library would write, and an end for what waits."""

from __future__ import annotations

import signal
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def a_minute() -> Iterator[None]:
    """Whatever waits for ever is ended by an alarm, with a traceback."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for ever"))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def png(header: bytes, content: bytes) -> bytes:
    """A PNG file of one IHDR and one IDAT."""
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(content)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
