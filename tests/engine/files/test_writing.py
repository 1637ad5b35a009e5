"""Files appear whole or not at all, whatever signal comes, and their place is tried beforehand."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.signalled import start

from stepfuse.engine.files import writing
from stepfuse.engine.files.signals import Terminated, kept, terminating

SLOW = textwrap.dedent(
    """
    import signal, sys, time
    from stepfuse.engine.files.writing import write_file, write_folder

    signal.signal(signal.SIGINT, signal.default_int_handler)

    def pieces():
        yield b"half"
        print("writing", flush=True)
        for _ in range(600):
            time.sleep(0.1)
            yield b"more"

    if sys.argv[1] == "file":
        write_file("a.bin", pieces())
    else:
        write_folder("a", ((f"{n}.png", piece) for n, piece in enumerate(pieces())), ".png")
    """
)


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_name(tmp_path: Path, what: str, number: int) -> None:
    """Also in a script of somebody's own, which dies of the signal as it would have anyway."""
    child = start(
        [sys.executable, "-c", SLOW, what],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    assert os.listdir(tmp_path)
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == -number
    assert os.listdir(tmp_path) == []


def test_a_signal_waits_until_the_name_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    seen: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(path.exists()))

    def pieces() -> Iterator[bytes]:
        yield b"one"
        signal.raise_signal(signal.SIGINT)  # between two pieces: acted upon, and it does not raise
        yield b"two"
        signal.raise_signal(signal.SIGINT)  # after the last one: acted upon at the end

    try:
        writing.write_file(path, pieces())
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [False, True]
    assert path.read_bytes() == b"onetwo"


def test_kept_signals_leave_handlers_as_they_were() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with kept() as outer, kept() as inner:
        signal.raise_signal(signal.SIGTERM)
        assert (outer.pending, inner.pending) == ([], [signal.SIGTERM])
        outer.pending.clear()
        inner.pending.clear()
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with kept() as waiting:
            signal.raise_signal(signal.SIGINT)
        assert waiting.pending == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_terminating_raises_and_other_threads_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(Terminated) as caught, terminating():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    thread = threading.Thread(target=writing.write_file, args=(tmp_path / "a", b"content"))
    thread.start()
    thread.join()
    assert (tmp_path / "a").read_bytes() == b"content"


def test_the_probe_is_of_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def reserve(descriptor: int, size: int) -> None:
        sizes.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "_reserve", reserve)
    for size in (writing.PROBE_BYTES, 10**9):
        with pytest.raises(OSError, match=r"No space left on device: .*a\.bin"):
            writing.check_file(tmp_path / "a.bin", size)
    assert sizes == [writing.PROBE_BYTES, 10**9]
    assert os.listdir(tmp_path) == []


def test_a_real_disk_that_is_too_small(tmp_path: Path) -> None:
    """More than any disk holds; nothing stays behind."""
    with pytest.raises(OSError, match=r"a\.bin") as caught:
        writing.check_file(tmp_path / "a.bin", 2**60)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert os.listdir(tmp_path) == []


def test_a_place_is_tried_without_making_it(tmp_path: Path) -> None:
    writing.check_place(tmp_path / "a/b/c")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"folder .*file/run: .*file is not a folder"):
        writing.check_place(tmp_path / "file/run")
    with pytest.raises(OSError, match=r"/proc/run|/proc/self/run"):
        writing.check_place("/proc/self/run")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(NotADirectoryError, match=r"link is not a folder"):
        writing.check_place(tmp_path / "link/run")
