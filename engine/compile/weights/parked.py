"""Weights in a file instead of memory: only their packed copies are computed with.

    before     weight ──► memory                          packed copies beside it: both are held
    after      weight ──► pages of an unnamed file        read back when somebody asks for them

The parameter stays what it is: its shape, strides and values, state_dict, copies, pickles and
``load_state_dict`` work as ever, at the price of reading the file. The mapping is private: what is
written to a weight goes to memory of this process, never to the file, and stays there. Weights that
lie in a file already, as those of a safetensors checkpoint do, are not written to another.

A weight moves from one address to another, which an operator that is reading it in another thread
would not survive. So nothing moves while other threads run Python.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.kernels.torch_names import storage_users

FEW = 1 << 20  # bytes of weights that are not worth a file
_PAGE_OUT = 21  # MADV_PAGEOUT of Linux 5.4: unlike MADV_DONTNEED it never loses what was written
PLAIN = (Tensor, nn.Parameter)
_SERVANTS = ("tqdm", "ipykernel", "pydevd", "debugpy")  # whose threads call no model
_homes: dict[int, int] = {}  # where a weight was before it was parked, by its address


@dataclass(frozen=True)
class _Range:
    """Addresses that are mapped to a file, and whether what is written there stays with us."""

    start: int
    end: int
    private: bool


class Files:
    """The files that are mapped into this process now."""

    def __init__(self) -> None:
        self._ranges: list[_Range] = []
        with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
            for line in maps:
                addresses, permissions, _, _, inode, *_ = line.split()
                if inode != "0":
                    start, end = (int(address, 16) for address in addresses.split("-"))
                    self._ranges.append(_Range(start, end, permissions.startswith("rw-p")))

    def __contains__(self, weight: Tensor) -> bool:
        return self._range(weight) is not None

    def can_write(self, weight: Tensor) -> bool:
        """It lies in a file, and writing to it does not change the file."""
        found = self._range(weight)
        return found is not None and found.private

    def _range(self, weight: Tensor) -> _Range | None:
        if type(weight) not in PLAIN or weight.device.type != "cpu":
            return None
        if weight.layout is not torch.strided:
            return None
        address = weight.data_ptr()
        before = bisect.bisect_right(self._ranges, address, key=lambda r: r.start)
        found = self._ranges[before - 1] if before else None
        return found if found and address < found.end else None

    def add(self, start: int, nbytes: int) -> None:
        """One that was mapped since."""
        bisect.insort(self._ranges, _Range(start, start + nbytes, True), key=lambda r: r.start)


class Parking:
    """Where the weights of one network go; ``note`` says why some stay in memory.

    A file as large as ``weights`` is made at once, where a temporary folder has twice the space: a
    disk that is full is found out here.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.files, self.note = Files(), ""
        self._file: Any = None
        self._end = 0
        movable = [w for w in weights if self._can_move(w)]
        others = other_threads()
        if movable and others:
            self.note = f"they stay in memory: thread {others[0]!r} may be reading them"
            return
        nbytes = sum({w.untyped_storage().data_ptr(): _room(w) for w in movable}.values())
        if nbytes >= FEW:
            try:
                self._open(_folder(nbytes), nbytes)
            except OSError as error:
                self.note = f"no file for them: {error}"

    def _open(self, folder: str, nbytes: int) -> None:
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(tempfile.TemporaryFile(dir=folder))
            os.posix_fallocate(file.fileno(), 0, nbytes)
            self._map = mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_PRIVATE)
            self.files.add(torch.frombuffer(self._map, dtype=torch.uint8).data_ptr(), nbytes)
            self._file = file
            undo.pop_all()

    def park(self, weight: Tensor) -> None:
        """Let ``weight`` leave memory: into the file, if nobody but itself holds its memory."""
        if weight in self.files:
            leave_memory(weight)
        elif self._file is not None and self._can_move(weight) and is_alone(weight):
            try:
                self._move(weight)
            except OSError as error:
                self.note = f"the others stay in memory: {error}"
                self._file.close()
                self._file = None

    def close(self, weights: Iterable[Tensor]) -> None:
        """No more come; of ``weights`` some may still be in memory."""
        if self._file is None:
            return
        os.ftruncate(self._file.fileno(), max(self._end, 1))
        self._file.close()
        left = sum(self._can_move(w) for w in weights)
        if left:
            self.note = f"{left} weights in memory are held by others too, a state_dict say"

    def _can_move(self, weight: Tensor) -> bool:
        """It lies in ordinary memory of this process, a page of it at least."""
        if type(weight) not in PLAIN or weight.device.type != "cpu" or weight in self.files:
            return False
        if weight.layout is not torch.strided or weight.is_conj() or weight.is_neg():
            return False
        storage = weight.untyped_storage()
        return storage.nbytes() >= mmap.PAGESIZE and not storage.is_shared()

    def _move(self, weight: Tensor) -> None:
        storage = weight.untyped_storage()
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
        start, written = self._end, 0
        while written < storage.nbytes():
            written += os.pwrite(self._file.fileno(), content[written:], start + written)
        self._end += _room(weight)
        # of the same kind: a weight that counts its versions or one of inference mode
        with torch.inference_mode(weight.is_inference()):
            parked = torch.frombuffer(self._map, dtype=torch.uint8, count=written, offset=start)
            address = parked.data_ptr() + int(weight.storage_offset()) * weight.itemsize
            _homes[address] = weight.data_ptr()
            weakref.finalize(self._map, _homes.pop, address, None)
            weight.data = parked.view(weight.dtype).as_strided(
                weight.shape, weight.stride(), weight.storage_offset()
            )


def other_threads() -> list[str]:
    """The names of threads beside this one that may call a model."""
    here = threading.get_ident()
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.ident != here and type(thread).__module__.partition(".")[0] not in _SERVANTS
    ]


def home(weight: Tensor) -> int:
    """Its address, or the one it had before it was parked: that is no change of the weight."""
    address = weight.data_ptr()
    return _homes.get(address, address)


def is_alone(weight: Tensor) -> bool:
    """Nobody else holds its memory: no state_dict, no view, no optimizer."""
    holders = storage_users(weight)
    return holders is not None and holders == storage_users(torch.empty(1))


def _room(weight: Tensor) -> int:
    """Whole pages, so that each weight can leave memory by itself."""
    return -(-weight.untyped_storage().nbytes() // mmap.PAGESIZE) * mmap.PAGESIZE


def leave_memory(weight: Tensor) -> None:
    """Forget the pages of a parked weight that were read back. What was written to it stays."""
    call = _madvise()
    if call is not None:
        storage = weight.untyped_storage()
        first = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        # an older kernel knows no such advice: they stay until somebody else needs the memory
        call(first, storage.data_ptr() + storage.nbytes() - first, _PAGE_OUT)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call


def _folder(nbytes: int) -> str:
    """A temporary folder on a disk that stays half empty; OSError where there is none."""
    if sys.platform != "linux":
        raise OSError(f"weights are parked on Linux only; this is {sys.platform}")
    reasons = []
    for folder in dict.fromkeys([tempfile.gettempdir(), "/var/tmp"]):
        try:
            space = os.statvfs(folder)
            free = space.f_bavail * space.f_frsize
            if _is_memory(folder):
                reasons.append(f"{folder} is memory itself")
            elif free < 2 * nbytes:
                reasons.append(f"{folder} has {free >> 20} MB free, {2 * nbytes >> 20} are wanted")
            else:
                return folder
        except OSError as error:
            reasons.append(str(error))
    raise OSError("; ".join(reasons))


def _is_memory(folder: str) -> bool:
    """The folder lies in a tmpfs, where a file takes as much memory as its content."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == wanted:
                return kind.split()[0] in ("tmpfs", "ramfs")
    return False
