"""A file of conditions as a whole: its index, its identity, its memory, and threads."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.engine.generate.conditions_case import NAMES, everything, refused, table_of, written

from stepfuse.engine.generate.conditions import marks
from stepfuse.engine.generate.conditions.choosing import choose, from_settings
from stepfuse.engine.generate.conditions.labels import Fixed, Random
from stepfuse.engine.generate.conditions.row import Conditions
from stepfuse.engine.generate.conditions.table import Table, index, open_table

ROWS = 300_000
MOST_MEMORY = 6 * 2**20  # a buffer of 1 MiB, some rows, and what Python keeps of them
PLAIN = "label,seed\n" + "".join(f"{n % 3},{n}\n" for n in range(10))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 300,000 rows, each some 60 bytes, with quoted line ends."""
    path = tmp_path_factory.mktemp("big") / "big.csv"
    with path.open("w", newline="") as file:
        file.write("label,seed,text\n")
        for n in range(ROWS):
            file.write(f'{n % 3},{n},"a text, in two\nlines, that is number {n}"\n')
    return path


@pytest.fixture(scope="module")
def big_table(big: Path) -> Table:
    """Its table."""
    return table_of(big)


@pytest.fixture
def plain(tmp_path: Path) -> Table:
    """A table of ten rows."""
    return table_of(written(tmp_path, "a.csv", PLAIN))


def peak(work: Callable[[], object]) -> int:
    """The most bytes that Python held at a time while this was done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(big: Path) -> None:
    place = big.with_suffix(".memory")
    assert big.stat().st_size > 2 * MOST_MEMORY
    assert peak(lambda: index(big, NAMES, place)) < MOST_MEMORY
    assert place.stat().st_size < 16 * (ROWS / marks.EVERY + 1) + 1000
    assert peak(lambda: open_table(big, place, NAMES).rows(ROWS - 5, 5)) < MOST_MEMORY


def test_any_row_of_a_big_file(big_table: Table) -> None:
    for first in (ROWS - 1, 123_456, 0, marks.EVERY * 3 - 1, ROWS - 64):
        rows = big_table.rows(first, 64)
        expected = [min(n, ROWS - 1) for n in range(first, first + 64)]
        assert [row.seed for row in rows] == expected
        assert [row.label for row in rows] == [n % 3 for n in expected]


def test_a_late_row_costs_what_an_early_one_does(big_table: Table) -> None:
    """A read passes over 4096 rows at most, wherever it is: not the file before it."""

    def seconds(first: int) -> float:
        times = []
        for _ in range(5):
            start = time.thread_time()
            big_table.rows(first, 64)
            times.append(time.thread_time() - start)
        return min(times)

    whole = 70 * marks.EVERY  # some 290,000 rows: passing over them takes 70 times as long
    assert seconds(whole + marks.EVERY - 100) < 10 * seconds(marks.EVERY - 100)


def test_any_order_and_many_threads(big_table: Table) -> None:
    firsts = [random.Random(5).randrange(ROWS) for _ in range(60)]
    together = threading.Barrier(4)

    def read(part: int) -> list[int | None]:
        together.wait()
        return [row.seed for first in firsts[part::4] for row in big_table.rows(first, 3)]

    with ThreadPoolExecutor(4) as pool:
        for part, seeds in enumerate(pool.map(read, range(4))):
            expected = [min(first + k, ROWS - 1) for first in firsts[part::4] for k in range(3)]
            assert seeds == expected


def test_the_facts(tmp_path: Path) -> None:
    path, place = written(tmp_path, "a.csv", PLAIN), tmp_path / "idx"
    seen: list[int] = []
    facts = index(path, NAMES, place, progress=seen.append).facts
    assert facts.sha256 == hashlib.sha256(PLAIN.encode()).hexdigest()
    assert (facts.size, facts.mtime_ns) == (len(PLAIN), path.stat().st_mtime_ns)
    assert (facts.rows, facts.columns, facts.guided) == (10, ("label", "seed"), False)
    assert sum(seen) == len(PLAIN)
    read = marks.load(place)
    assert read.facts == facts
    assert read.marks.tolist() == [[0, len("label,seed\n")]]
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "idx"]


def test_rows_repeat(plain: Table) -> None:
    found = Table(plain.path, plain.index, NAMES, 3)
    assert [row.seed for row in found.rows(4, 6)] == [1, 1, 2, 2, 2, 3]
    assert [row.seed for row in found.rows(28, 5)] == [9, 9, 9, 9, 9]
    assert [row.seed for row in found.rows(2**50, 2)] == [9, 9]
    assert found.rows(7, 0) == []
    found.check(30)
    line = "too few rows: 10 of 3 images each, 11 are needed for 31 images"
    with pytest.raises(ValueError, match=f"^{found.path} has {line}$"):
        found.check(31)


def test_too_few_rows(plain: Table) -> None:
    plain.check(10)
    with pytest.raises(ValueError, match=r"too few rows: 10, 11 are needed for 11 images$"):
        plain.check(11)


@pytest.mark.parametrize(
    ("first", "count"), [(-1, 2), (0, -1)], ids=["before the first", "fewer than none"]
)
def test_a_span_of_no_images(plain: Table, first: int, count: int) -> None:
    with pytest.raises(ValueError, match="must be at least 0; got -1"):
        plain.rows(first, count)


def test_a_copy_is_the_same_file(plain: Table, tmp_path: Path) -> None:
    """Of another time and place: it is hashed once, then trusted."""
    copy = tmp_path / "elsewhere.txt"
    shutil.copyfile(plain.path, copy)
    os.utime(copy, ns=(5, 5))
    hashed: list[int] = []
    found = open_table(copy, tmp_path / "a.idx", NAMES, progress=hashed.append)
    assert sum(hashed) == len(PLAIN)
    assert everything(found) == everything(plain)
    os.utime(copy, ns=(6, 6))
    assert everything(found) == everything(plain)
    found.verify(hashed.append)
    assert sum(hashed) == len(PLAIN)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (PLAIN.replace("9\n", "8\n"), "its SHA-256 is [0-9a-f]{64}; accepted: [0-9a-f]{64}"),
        (PLAIN + "1,1\n", f"it has {len(PLAIN) + 4} bytes; accepted: {len(PLAIN)}"),
    ],
)
def test_another_content_is_refused(plain: Table, tmp_path: Path, content: str, line: str) -> None:
    """When it is opened, and in the middle of a job."""
    time.sleep(0.01)  # some file systems tell times apart by no less
    written(tmp_path, "a.csv", content)
    line = f"^{plain.path} has changed since the job was created: {line}$"
    with pytest.raises(ValueError, match=line):
        open_table(plain.path, tmp_path / "a.idx", NAMES)
    with pytest.raises(ValueError, match=line):
        plain.rows(0, 1)


def test_a_file_that_is_gone(plain: Table, tmp_path: Path) -> None:
    plain.path.unlink()
    with pytest.raises(FileNotFoundError):
        plain.rows(0, 1)
    with pytest.raises(FileNotFoundError):
        index(plain.path, NAMES, tmp_path / "new.idx")


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", PLAIN)

    def grow(_: int) -> None:
        with path.open("a") as file:
            file.write("1,5\n" if file.tell() < 1000 else "")

    with pytest.raises(ValueError, match=f"^{path} was changed while it was read"):
        index(path, NAMES, tmp_path / "idx", progress=grow)
    assert not (tmp_path / "idx").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.csv"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    refused(path, " is a .*; accepted: a file of CSV, JSON Lines or Parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.csv.gz", "csv"])
def test_another_ending(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, PLAIN)
    line = r"conditions are read from files that end in \.csv, .*\.parquet; got "
    with pytest.raises(ValueError, match=f"^{line}{path}$"):
        index(path, NAMES, tmp_path / "idx")


@pytest.mark.parametrize("at", [0, 5, 30, 40, 80, -20, -1])
def test_a_damaged_index(plain: Table, tmp_path: Path, at: int) -> None:
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[at] ^= 1
    written(tmp_path, "a.idx", bytes(content))
    with pytest.raises(ValueError, match=r"a\.idx is no index of conditions, or it is damaged"):
        open_table(plain.path, tmp_path / "a.idx", NAMES)


@pytest.mark.parametrize("content", [b"", b"label\n", b"stepfuse conditions index 1\n"])
def test_what_is_no_index(plain: Table, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="is no index of conditions"):
        open_table(plain.path, written(tmp_path, "b.idx", content), NAMES)


def test_a_model_without_classes(tmp_path: Path) -> None:
    labelled = written(tmp_path, "a.csv", "label,seed\nnone,1\n")
    assert [row.label for row in table_of(labelled, ()).rows(0, 1)] == [None]
    line = r", row 0 \(line 2\): label must be none, as the model has no classes; got '1'"
    refused(written(tmp_path, "b.csv", "label\n1\n"), line, ())
    line = r", row 0 \(line 2\): guidance 3 needs labels to be guided by, but .*"
    refused(written(tmp_path, "c.csv", "guidance\n3\n"), line, ())


def test_conditions_are_chosen_and_rebuilt(tmp_path: Path) -> None:
    labelled = written(tmp_path, "a.csv", PLAIN)
    bare = written(tmp_path, "b.csv", "seed,guidance\n1,2\n2,\n")
    cases: list[tuple[Path, Conditions]] = [
        (labelled, choose(NAMES, path=labelled, index_path=tmp_path / "1", per_row=2)),
        (bare, choose(NAMES, path=bare, index_path=tmp_path / "2")),
        (bare, choose(NAMES, path=bare, index_path=tmp_path / "3", labels="random", seed=4)),
        (bare, choose(NAMES, path=bare, index_path=tmp_path / "4", labels=["star"])),
    ]
    for number, (path, made) in enumerate(cases, 1):
        settings = json.loads(json.dumps(made.settings()))
        again = from_settings(settings, path, tmp_path / str(number))
        assert again.rows(0, 30) == made.rows(0, 30)
        assert again.settings() == settings
        copy = pickle.loads(pickle.dumps(made))
        assert copy.rows(0, 30) == made.rows(0, 30)
    drawn = [row.label for row in cases[2][1].rows(0, 30)]
    assert drawn == Random(3, 4).labels(0, 30)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    path, place = written(tmp_path, "a.csv", PLAIN), tmp_path / "idx"
    bare = written(tmp_path, "b.csv", "seed\n1\n")
    with pytest.raises(ValueError, match=r"a\.csv: has a column of labels; accepted: no other"):
        choose(NAMES, path=path, index_path=place, labels="random")
    with pytest.raises(ValueError, match=r"a\.csv: has a column of labels; accepted: no other"):
        choose(NAMES, path=path, index_path=place, per_class=4)
    with pytest.raises(ValueError, match="--per-row 3 needs --conditions"):
        choose(NAMES, per_row=3)
    with pytest.raises(ValueError, match="index_path"):
        choose(NAMES, path=path)
    with pytest.raises(ValueError, match="per_row must be at least 1; got 0"):
        choose(NAMES, path=path, index_path=place, per_row=0)
    assert not place.exists()
    index(path, NAMES, place)
    with pytest.raises(ValueError, match="has a column of labels; accepted: no other"):
        open_table(path, place, NAMES, otherwise=Fixed(0))
    index(bare, NAMES, place)
    with pytest.raises(ValueError, match="has no column of labels; accepted: a choice"):
        open_table(bare, place, NAMES)


def test_settings_of_another_file(tmp_path: Path) -> None:
    one, other = written(tmp_path, "a.csv", PLAIN), written(tmp_path, "b.csv", PLAIN + "1,1\n")
    settings = choose(NAMES, path=one, index_path=tmp_path / "1").settings()
    choose(NAMES, path=other, index_path=tmp_path / "2")
    with pytest.raises(ValueError, match=r"b\.csv and its index .* not those of the job: sha256"):
        from_settings(settings, other, tmp_path / "2")
    with pytest.raises(ValueError, match=r"b\.csv has changed since the job was created"):
        from_settings(settings, other, tmp_path / "1")
    with pytest.raises(ValueError, match="need path and index_path"):
        from_settings(settings)
