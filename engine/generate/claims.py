"""Claims: files that say who is at something, for processes that share a folder.

A claim is made where there is none, touched while its owner lives, and nobody's once it was not
touched for a lease, or its owner is known to be gone. Two owners of one claim do no harm to shards,
which are the same whoever makes them; claims save work, they do not keep anything right.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from stepfuse.engine.files.owners import host, runs
from stepfuse.engine.generate.place import LEASE, LocalPlace, Place

FOLDER = "claims"
_POLL = 0.2
_PATIENCE = 10  # times that others may remove the folder of claims in between


class Claim:
    """One claim of one process; ``name`` says on what."""

    def __init__(self, place: Place, name: str, lease: float = LEASE) -> None:
        if not isinstance(place, LocalPlace):
            raise ValueError(f"claims need a folder that this machine sees; got {place.url}")
        self.path, self.lease = place.folder / FOLDER / name, lease

    def take(self) -> bool:
        """Whether it is ours now."""
        if self._make():
            return True
        if not self._is_nobodys():
            return False
        # only one of several that saw this can rename it
        aside = self.path.with_name(f".{self.path.name}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return self._make()
        aside.unlink(missing_ok=True)
        return self._make()

    def touch(self) -> None:
        """Say that we are still at it."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Let others have it."""
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside it is ours; waits for whoever has it before."""
        while not self.take():
            time.sleep(_POLL)
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(over,), daemon=True)
        beat.start()
        try:
            yield
        finally:
            over.set()
            beat.join()
            self.release()

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(self.lease / 5):
            self.touch()

    def _make(self) -> bool:
        for last in (False,) * _PATIENCE + (True,):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            except FileNotFoundError:  # somebody has just found the folder empty and removed it
                if last:
                    raise
            else:
                with os.fdopen(descriptor, "w") as file:
                    file.write(f"{host()} {os.getpid()}\n")
                return True
        return False

    def _is_nobodys(self) -> bool:
        return is_nobodys(self.path, self.lease)


def is_nobodys(path: Path, lease: float = LEASE) -> bool:
    """Whether the owner of the claim in this file has not touched it for long, or is gone."""
    try:
        idle = time.time() - path.stat().st_mtime
        owner, _, process = path.read_text(encoding="utf-8").strip().partition(" ")
    except FileNotFoundError:
        return False
    if idle > lease:
        return True
    return owner == host() and process.isdecimal() and not runs(int(process))


def held(place: Place) -> list[str]:
    """What somebody is at, by the names of the claims."""
    if not isinstance(place, LocalPlace):
        return []
    return [
        path.name
        for path in (place.folder / FOLDER).glob("[!.]*")
        if path.is_file() and not is_nobodys(path)
    ]


def clean(place: Place) -> None:
    """Remove the claims that are nobody's, and their folder once it is empty."""
    if isinstance(place, LocalPlace):
        for path in (place.folder / FOLDER).glob("*"):
            if path.is_file() and is_nobodys(path):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are at work, or it was never made
            (place.folder / FOLDER).rmdir()
