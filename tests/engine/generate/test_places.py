"""Claims, slices, cores, the queue to the writer, and whose temporary names are removed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfuse.engine.files import owners
from stepfuse.engine.files.writing import remove_leftovers, staged, write_file
from stepfuse.engine.generate import claims, crew, machine
from stepfuse.engine.generate.claims import Claim
from stepfuse.engine.generate.formats import choose
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.pipeline import write_shard
from stepfuse.engine.generate.place import LocalPlace, open_place
from stepfuse.engine.generate.shards import Shards, name, number
from stepfuse.engine.generate.slices import Slice, parse


def dead_process() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_staged_puts_a_file_or_a_folder_in_place(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        with staged(tmp_path / "file") as path:
            path.write_bytes(content)
        assert (tmp_path / "file").read_bytes() == content
        with staged(tmp_path / "folder") as path:
            path.mkdir()
            (path / content.decode()).write_bytes(content)
        assert [p.name for p in (tmp_path / "folder").iterdir()] == [content.decode()]

    def fail() -> None:
        with staged(tmp_path / "file") as path:
            path.write_bytes(b"third")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "file").read_bytes() == b"second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_errors_of_the_place_name_it_and_others_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, staged(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "file")
    with pytest.raises(FileNotFoundError) as missing, staged(tmp_path / "file"):
        (tmp_path / "weights").read_bytes()
    assert missing.value.filename == str(tmp_path / "weights")


def test_the_rename_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "file", b"x")
    assert flushed[-1] == str(tmp_path)
    assert Path(flushed[0]).name.startswith(".stepfuse-")


def test_leftovers_of_the_dead_are_removed_and_of_the_living_are_not(tmp_path: Path) -> None:
    here = owners.host()
    names = {
        "living": f".stepfuse-{here}-{os.getpid()}-00.tmp",
        "dead": f".stepfuse-{here}-{dead_process()}-00.tmp",
        "elsewhere": f".stepfuse-other-host-{os.getpid()}-00.tmp",
        "old": ".stepfuse-other-host-1-01.tmp",
        "file": "shard.tar",
    }
    for file in names.values():
        (tmp_path / file).write_text("")
    past = time.time() - 1000
    os.utime(tmp_path / names["old"], (past, past))
    removed = remove_leftovers(tmp_path, older_than=500)
    assert {p.name for p in removed} == {names["dead"], names["old"]}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_claim_is_one_process_s(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    first, second = Claim(place, "000001"), Claim(place, "000001")
    assert first.take()
    assert not second.take()
    first.release()
    assert second.take()
    (tmp_path / "claims" / "000001").write_text(f"{owners.host()} {dead_process()}\n")
    assert first.take()
    (tmp_path / "claims" / "000001").write_text("another-host 1\n")
    assert not second.take()
    past = time.time() - 1000
    os.utime(tmp_path / "claims" / "000001", (past, past))
    assert second.take()
    claims.clean(place)
    assert (tmp_path / "claims" / "000001").exists()
    second.release()
    claims.clean(place)
    assert not (tmp_path / "claims").exists()
    with pytest.raises(ValueError, match="a folder that this machine sees"):
        Claim(open_place("memory://x"), "job")


def test_waiting_for_a_claim_ends_when_it_is_released(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    order = []
    inside = threading.Event()

    def other() -> None:
        with Claim(place, "job").waiting():
            inside.set()
            time.sleep(0.3)
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with Claim(place, "job").waiting():
        order.append("this")
    thread.join()
    assert order == ["other", "this"]


@pytest.mark.parametrize(
    ("text", "variables", "index", "count"),
    [
        ("0/1", {}, 0, 1),
        ("3/8", {}, 3, 8),
        ("auto", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4",
                  "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}, 3, 4),
        ("auto", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, 2, 4),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, 1, 2),
        ("auto", {"JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "6"}, 5, 6),
        ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "9"}, 0, 9),
    ],
)  # fmt: skip
def test_slices_are_read(text: str, variables: dict[str, str], index: int, count: int) -> None:
    assert parse(text, variables) == Slice(index, count)


@pytest.mark.parametrize(
    ("text", "variables", "told"),
    [
        ("4/4", {}, "0 <= i < n; got 4/4"),
        ("0/0", {}, "got 0/0"),
        ("1", {}, "must be i/n, 0/8 say, or auto; got '1'"),
        ("auto", {}, "finds none of SLURM_ARRAY_TASK_ID with SLURM_ARRAY_TASK_COUNT"),
        ("auto", {"JOB_COMPLETION_INDEX": "5"}, "JOB_COMPLETIONS, how many there are, is not"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "must be numbers"),
        ("auto", {"RANK": "9", "WORLD_SIZE": "2"}, "got 9/2"),
    ],
)
def test_other_slices_are_refused(text: str, variables: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse(text, variables)


def test_slices_share_everything_out() -> None:
    shards = range(17)
    parts = [list(Slice(i, 3).of(shards)) for i in range(3)]
    assert sorted(k for part in parts for k in part) == list(shards)
    assert sorted([*Slice(1, 3).others(shards), *parts[1]]) == list(shards)


def test_shards_cover_every_image_once() -> None:
    shards = Shards(21, 8)
    spans = [shards.span(k) for k in shards]
    assert spans == [(0, 8), (8, 8), (16, 5)]
    with pytest.raises(IndexError, match=r"0 \.\. 2; got 3"):
        shards.span(3)
    assert len(Shards(10**12, 10**4)) == 10**8
    assert [number(n) for n in (name(7) + ".tar", "1234567.json", ".x", "records", "12")] == [
        7, 1234567, None, None, None,
    ]  # fmt: skip


def test_cores_are_of_the_affinity_and_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    there = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(machine, "_quota", lambda: None)
    assert machine.usable_cores() == len(there)
    monkeypatch.setattr(machine, "_quota", lambda: 1.5)
    assert machine.usable_cores() == 1
    assert machine.physical_cores() == 1
    monkeypatch.setattr(machine, "_quota", lambda: 0.2)
    assert machine.usable_cores() == 1
    two = machine.groups(2, 1)
    assert len(two) == 2
    assert not set(two[0]) & set(two[1])
    many = machine.groups(len(there) + 1, 1)
    assert many[-1] == []


def test_a_crew_fits_into_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "physical_cores", lambda: 8)
    monkeypatch.setattr(crew, "free_memory", lambda: 4 * 10**9)
    monkeypatch.setattr(crew, "groups", lambda n, t: [list(range(t))] * n)
    assert len(crew.choose_crew("cpu", 1)) == 8
    assert len(crew.choose_crew("cpu", 4)) == 2
    assert len(crew.choose_crew("cpu", 1, peak_bytes=10**9)) == 4
    assert len(crew.choose_crew("cpu", 1, peak_bytes=10**11)) == 1
    assert len(crew.choose_crew("cpu", 1, workers=3)) == 3
    with pytest.raises(ValueError, match="--device must be auto, cpu, cuda or cuda:N; got 'tpu'"):
        crew.resolve_device("tpu")


def _made(count: int) -> Iterator[list[Made]]:
    for n in range(count):
        yield [Made(n, np.full((4, 4, 1), n, np.uint8))]


def test_the_writer_holds_up_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-pressure: never more than a few lists wait, and the time is counted."""
    format = choose("webdataset")
    ahead, given = [], []

    def batches() -> Iterator[list[Made]]:
        for batch in _made(12):
            given.append(batch[0].n)
            yield batch

    real = type(format).encode

    def encode(self: Any, made: Made) -> bytes:
        time.sleep(0.02)
        ahead.append(len(given) - made.n)
        return real(self, made)

    monkeypatch.setattr(type(format), "encode", encode)
    written = write_shard(format, tmp_path / "a.tar", batches(), 12)
    assert len(written.checksums) == 12
    assert max(ahead) <= 5
    assert written.waited > 0.05


@pytest.mark.parametrize("side", ["sampler", "writer", "count"])
def test_either_side_may_fail(tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    format = choose("webdataset")

    def batches() -> Iterable[list[Made]]:
        yield from _made(4)
        if side == "sampler":
            raise RuntimeError("sampler")
        yield from ([Made(n, np.zeros((4, 4, 1), np.uint8))] for n in range(4, 40))

    if side == "writer":
        monkeypatch.setattr(
            type(format), "encode", lambda self, made: (_ for _ in ()).throw(OSError(28, "full"))
        )
    before = threading.active_count()
    with pytest.raises((RuntimeError, OSError, ValueError), match={"sampler": "sampler"}.get(side)):
        write_shard(format, tmp_path / "a.tar", batches(), 7)
    assert threading.active_count() == before


def test_a_folder_that_cannot_be_replaced_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(tmp_path / "folder") as path:
        path.mkdir()
        (path / "old").write_bytes(b"old")
    real, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 3:  # tried, moved aside, tried again
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    def fail() -> None:
        with staged(tmp_path / "folder") as path:
            path.mkdir()
            (path / "new").write_bytes(b"new")
            monkeypatch.setattr(os, "replace", replace)

    with pytest.raises(OSError, match="Input/output error"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["old"]
