"""The folder of a job: on this machine or a shared one, or anywhere fsspec goes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from stepfuse.engine.files.writing import (
    check_place,
    remove_leftovers,
    staged,
    write_file,
)

LEASE = 600.0  # seconds without a sign of life after which a claim or a temporary name is nobody's
A_FOLDER = -1  # in place of a size
_FILE = "file://"


class Place(Protocol):
    """Files by names such as "records/000123.json". Every one appears whole or not at all.

    Attributes:
        url: to name it in messages and on the command line.
        exclusive: whether a file can be made only where there is none, which leases need.
    """

    url: str
    exclusive: bool

    def check(self) -> None:
        """Raise OSError with the reason where nothing can be written here."""

    def read(self, name: str) -> bytes:
        """The content; FileNotFoundError where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Put a small file in place."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of everything in a folder, by name; `A_FOLDER` for folders. No temporary names."""

    def size(self, name: str) -> int | None:
        """Bytes of one file; `A_FOLDER` for a folder, None for what is not there."""

    def remove(self, name: str) -> None:
        """Remove a file if there is one."""

    def staged(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to make a file or folder under, put in place when the block ends well."""

    def fetched(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path with the file or folder of that name, to be read inside."""

    def clean(self) -> None:
        """Remove what processes left that are gone."""

    def free(self) -> int | None:
        """Bytes that can still be written; None where nobody knows."""


def open_place(where: str | os.PathLike[str]) -> Place:
    """The place of a path, or of a URL such as s3://bucket/run."""
    text = os.fspath(where)
    if not text:
        raise ValueError("--out must name a folder or a URL; got ''")
    if text.startswith(_FILE) and text != _FILE:
        return LocalPlace(Path(text.removeprefix(_FILE)))  # a rename is safer than what fsspec does
    return RemotePlace(text) if "://" in text else LocalPlace(Path(text))


class LocalPlace:
    """A folder that this machine sees, alone or with others."""

    exclusive = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, os.fspath(folder)

    def check(self) -> None:
        """Raise OSError with the reason where nothing can be written here."""
        check_place(self.folder)

    def read(self, name: str) -> bytes:
        """The content; FileNotFoundError where there is none."""
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Put a small file in place."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of everything in a folder, by name."""
        try:
            with os.scandir(self.folder / folder) as entries:
                return {
                    entry.name: A_FOLDER if entry.is_dir() else entry.stat().st_size
                    for entry in entries
                    if not entry.name.startswith(".")
                }
        except FileNotFoundError:
            return {}

    def size(self, name: str) -> int | None:
        """Bytes of one file."""
        path = self.folder / name
        try:
            return A_FOLDER if path.is_dir() else path.stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file if there is one."""
        (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A name beside the final one, renamed at the end."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as temporary:
            yield temporary

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """The path itself."""
        path = self.folder / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there")
        yield path

    def clean(self) -> None:
        """Remove what processes left that are gone."""
        for folder in (self.folder, *(p for p in self.folder.glob("*") if p.is_dir())):
            remove_leftovers(folder, LEASE)

    def free(self) -> int | None:
        """Bytes that can still be written."""
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        return shutil.disk_usage(there).free


class RemotePlace:
    """A URL: one PUT under the final name, which object stores make whole or not at all."""

    exclusive = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise ValueError(f"{url} needs fsspec: pip install fsspec") from None
        try:
            found: tuple[Any, str] = url_to_fs(self.url)
        except ImportError as error:
            raise ValueError(f"{url} needs what speaks {protocol}://: {error}") from None
        except ValueError as error:
            raise ValueError(f"{url} is no URL that fsspec knows: {error}") from None
        self.files, self.root = found[0], found[1].rstrip("/")
        self.shared = protocol != "memory"

    def check(self) -> None:
        """Raise OSError with the reason where nothing can be written here."""
        try:
            self._make_parent(".stepfuse-probe")
            self.files.pipe_file(self._at(".stepfuse-probe"), b"")
            self.files.rm_file(self._at(".stepfuse-probe"))
        except OSError:
            raise
        except Exception as error:  # every store has its own kind
            raise OSError(f"cannot write {self.url}: {error}") from error

    def read(self, name: str) -> bytes:
        """The content; FileNotFoundError where there is none."""
        content: bytes = self.files.cat_file(self._at(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Put a small file in place."""
        self._make_parent(name)
        self.files.pipe_file(self._at(name), content)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of everything in a folder, by name."""
        try:
            self.files.invalidate_cache()
            listed = self.files.ls(self._at(folder), detail=True)
        except FileNotFoundError:
            return {}
        found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in listed}
        return {
            name: A_FOLDER if entry["type"] == "directory" else int(entry["size"])
            for name, entry in found.items()
            if name and not name.startswith(".")
        }

    def size(self, name: str) -> int | None:
        """Bytes of one file."""
        try:
            self.files.invalidate_cache()
            entry = self.files.info(self._at(name))
        except FileNotFoundError:
            return None
        return A_FOLDER if entry["type"] == "directory" else int(entry["size"])

    def remove(self, name: str) -> None:
        """Remove a file if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self._at(name))

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A path in the temporary folder, sent at the end; of a folder, file after file."""
        with tempfile.TemporaryDirectory(prefix="stepfuse-") as folder:
            path = Path(folder, Path(name).name)
            yield path
            sent = sorted(path.iterdir()) if path.is_dir() else [path]
            for file in sent:
                target = f"{name}/{file.name}" if path.is_dir() else name
                self._make_parent(target)
                self.files.put_file(os.fspath(file), self._at(target))

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A copy in the temporary folder."""
        with tempfile.TemporaryDirectory(prefix="stepfuse-") as folder:
            path = Path(folder, Path(name).name)
            self.files.get(
                self._at(name), os.fspath(path), recursive=self.files.isdir(self._at(name))
            )
            yield path

    def clean(self) -> None:
        """Nothing is left: a PUT that was cut off is no file."""

    def free(self) -> int | None:
        """Nobody knows."""
        return None

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _make_parent(self, name: str) -> None:
        # object stores have no folders; others, sftp say, have
        self.files.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
