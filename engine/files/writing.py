"""Files and folders that appear whole or not at all.

Everything is written to a temporary name in the same folder, flushed to the disk and renamed, and
the rename is flushed, too: a full disk, a crash or Ctrl-C leaves the old file, or none. Ctrl-C and
SIGTERM wait while a temporary name exists, so that they never leave one behind, see
``stepfuse.engine.files.signals``. What SIGKILL leaves is found by `remove_leftovers`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from stepfuse.engine.files.owners import host, runs
from stepfuse.engine.files.signals import kept

PROBE_BYTES = 4096  # a full disk still takes empty files
_PATIENCE = 10  # times that two processes may put a folder in the same place
_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST)
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # reserving, by some file systems


def write_file(path: str | os.PathLike[str], content: bytes | Iterable[bytes]) -> None:
    """Write ``content``, in one piece or several, to ``path``, replacing what is there.

    OSError names ``path``.
    """
    with kept() as signals, staged(path) as temporary:
        _write(temporary, content if isinstance(content, bytes) else signals.between(content))


@contextlib.contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside ``path`` to make a file or a folder under, which then takes its place.

    It is flushed and renamed when the block ends, and removed where the block raises. A folder that
    is there is replaced. Signals are not kept: what they raise inside goes through.

    OSError, also of the block, names ``path``.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with _blaming(path, temporary):
            yield temporary
            _flush_all(temporary)
            _put(temporary, path)
            _flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # a disk that is read-only by now, say
            _remove(temporary)


def temporaries(folder: str | os.PathLike[str], older_than: float) -> Iterator[tuple[Path, bool]]:
    """Temporary names in ``folder``, each with whether somebody may still finish it.

    Nobody will where it is of a process of this machine that is gone; or of another machine, and
    nothing was written to it for ``older_than`` seconds.
    """
    for path in Path(folder).glob(".stepfuse-*.tmp"):
        try:
            idle = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # it was finished meanwhile
            continue
        place, _, process = path.name.removeprefix(".stepfuse-").rpartition("-")[0].rpartition("-")
        ours = place == host() and process.isdecimal()
        yield path, runs(int(process)) if ours else idle <= older_than


def remove_leftovers(folder: str | os.PathLike[str], older_than: float) -> list[Path]:
    """Remove the `temporaries` in ``folder`` that nobody will finish; returns what was removed."""
    removed = [path for path, alive in temporaries(folder, older_than) if not alive]
    for path in removed:
        _remove(path)
    return removed


def write_folder(
    path: str | os.PathLike[str],
    files: Iterable[tuple[str, bytes]],
    ending: str,
    *,
    force: bool = False,
) -> None:
    """Write (name, content) pairs into the folder ``path``, which must be new or empty.

    With ``force`` a folder is replaced that holds nothing but files with the ending of the new ones
    (".png", say): a run replaces an earlier run, never somebody's home.

    Raises FileExistsError for a folder that is not to be replaced, NotADirectoryError for a file.
    """
    path = Path(path).resolve()
    check_folder(path, ending, force=force)
    with kept() as signals, staged(path) as temporary:
        os.mkdir(temporary)
        for name, content in signals.between(files):
            _write(temporary / name, content)
        # in a second pass, when the disk has caught up with most of them
        for file in signals.between(temporary.iterdir()):
            _flush(file)


def check_file(path: str | os.PathLike[str], size: int = PROBE_BYTES) -> None:
    """Raise OSError with the reason where ``write_file`` could not write to ``path``.

    A file of ``size`` bytes is made beside it and removed.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    _check_parent(path, size)


def check_place(folder: str | os.PathLike[str]) -> None:
    """Raise OSError with the reason where ``folder`` cannot be written to, or made and written to.

    Nothing is made: of a folder that is missing, the nearest one above it is tried.
    """
    folder = Path(folder).absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write the folder {folder}: {there} is not a folder")
    _probe(there / "file", PROBE_BYTES, folder)


def check_folder(path: str | os.PathLike[str], ending: str, *, force: bool = False) -> None:
    """Raise OSError with the reason where ``write_folder`` could not write to ``path``."""
    path = Path(path).resolve()
    _check_parent(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise NotADirectoryError(f"cannot write the folder {path}: it is a file")
    for entry in path.iterdir():
        if not force:
            raise FileExistsError(
                f"folder {path} is not empty; accepted: a new or an empty one, or --force"
            )
        if entry.suffix != ending or not entry.is_file():
            raise FileExistsError(
                f"folder {path} is not replaced, not even by force: it holds {entry.name!r}, "
                f"which is no {ending} file"
            )


def _check_parent(path: Path, size: int = PROBE_BYTES) -> None:
    parent = path.parent
    if not parent.is_dir():
        what = "is not a folder" if parent.exists() else "does not exist"
        raise FileNotFoundError(f"cannot write {path}: folder {parent} {what}")
    with _blaming(path), contextlib.suppress(FileNotFoundError):
        os.lstat(path)
    _probe(path, size, path)


def _probe(path: Path, size: int, blamed: Path) -> None:
    """Make a file of ``size`` bytes beside ``path`` and remove it."""
    probe = _beside(path)
    with kept():
        try:
            with _blaming(blamed), probe.open("xb", buffering=0) as file:
                _reserve(file.fileno(), size)
        finally:
            with contextlib.suppress(OSError):  # the reason is told by what was tried before
                probe.unlink(missing_ok=True)


def _reserve(descriptor: int, size: int) -> None:
    """Take ``size`` bytes of the disk for an empty file."""
    if hasattr(os, "fstatvfs"):
        # where reserving is imitated it takes a write for every block: not for what cannot fit
        disk = os.fstatvfs(descriptor)
        if disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        else:
            return
    os.write(descriptor, bytes(min(size, PROBE_BYTES)))


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody uses."""
    return path.with_name(f".stepfuse-{host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _put(temporary: Path, path: Path) -> None:
    """Rename. A folder that is in the way, which no rename replaces, is moved aside, and removed
    once the new one is there; where it cannot be put there, the old one comes back.
    """
    for _ in range(_PATIENCE):
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in _IN_THE_WAY or not path.is_dir():
                raise
        else:
            return
        old = _beside(path)
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError as error:
            if old.exists():
                with contextlib.suppress(OSError):  # another process has put its own there
                    os.replace(old, path)
            if error.errno not in _IN_THE_WAY:
                raise
        else:
            return
        finally:
            _remove(old)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, content: bytes | Iterable[bytes]) -> None:
    with path.open("xb") as file:
        for piece in (content,) if isinstance(content, bytes) else content:
            file.write(piece)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(path: Path) -> None:
    """A file, or a folder and every file in it."""
    if not path.is_dir():
        _flush(path)
        return
    for file in path.iterdir():
        _flush(file)
    _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    """The names in it; without this a power cut may undo a rename. Not every system can do it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _blaming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """OSError raised inside names ``path``, not the temporary name.

    Where that is given, errors about other files are left as they are.
    """
    try:
        yield
    except OSError as error:
        named = error.filename
        if temporary is not None and named and not str(named).startswith(os.fspath(temporary)):
            raise
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
