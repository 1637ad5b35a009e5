"""CSV as spreadsheets, pandas and people write it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.generate.conditions_case import NAMES, everything, refused, table_of, written

from stepfuse.engine.generate.conditions import marks, table

PLAIN = "label,seed,guidance,prompt\nstar,7,1.5,a\nnone,,,b\n0,-1,-2,\n"
FIELDS = st.text(
    st.one_of(st.sampled_from('",\r\n ;é\u2028\x0b'), st.characters(codec="utf-8")), max_size=12
).filter(lambda text: "\0" not in text)


def test_columns(tmp_path: Path) -> None:
    found = table_of(written(tmp_path, "a.csv", PLAIN))
    assert everything(found) == [
        (2, 7, 1.5, {"prompt": "a"}),
        (3, None, None, {"prompt": "b"}),
        (0, -1, -2.0, {"prompt": ""}),
    ]
    assert found.guided
    assert found.index.facts.columns == ("label", "seed", "guidance", "prompt")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("last", [-1, 0, 1, 3], ids=["cut", "usual", "blank", "blanks"])
def test_every_way_to_end_a_line(tmp_path: Path, bom: bytes, end: bytes, last: int) -> None:
    lines = PLAIN.encode().rstrip(b"\n").split(b"\n")
    content = bom + end.join(lines) + end * (last + 1)
    plain = everything(table_of(written(tmp_path, "plain.csv", PLAIN)))
    found = table_of(written(tmp_path, "other.CSV", content))
    assert everything(found) == plain
    assert [found.rows(n, 1) for n in (2, 0, 1)] == [found.rows(0, 3)[n : n + 1] for n in (2, 0, 1)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    texts=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=30),
    end=st.sampled_from(["\n", "\r\n"]),
    every=st.integers(1, 5),
    data=st.data(),
)
def test_whatever_is_quoted_comes_back(
    tmp_path: Path, texts: list[tuple[str, str]], end: str, every: int, data: st.DataObject
) -> None:
    """Line ends, quotes and commas inside quotes, from the beginning and from any mark."""
    out = io.StringIO()
    # some versions of Python leave what is not in the terminator without quotes
    quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
    writer = csv.writer(out, lineterminator=end, quoting=quoting)
    writer.writerow(("note", "label", 'a, "b"\n'))
    for number, (one, other) in enumerate(texts):
        writer.writerow((one, NAMES[number % 3], other))
    path = written(tmp_path, "quoted.csv", out.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "EVERY", every)
        found = table_of(path)
    assert len(found.index.marks) == -(-len(texts) // every)
    expected = [
        (number % 3, None, None, {"note": one, 'a, "b"\n': other})
        for number, (one, other) in enumerate(texts)
    ]
    assert everything(found) == expected
    first = data.draw(st.integers(0, len(texts) - 1))
    count = data.draw(st.integers(1, len(texts) - first))
    rows = found.rows(first, count)
    assert [(row.label, None, None, row.extra) for row in rows] == expected[first : first + count]


def test_a_mark_every_so_often(tmp_path: Path) -> None:
    lines = "".join(f'{n % 3},"line\n{n}"\n' for n in range(3 * marks.EVERY + 5))
    found = table_of(written(tmp_path, "a.csv", f"label,text\n{lines}"))
    assert found.index.marks[:, 0].tolist() == [k * marks.EVERY for k in range(4)]
    for n in (3 * marks.EVERY + 4, marks.EVERY - 1, marks.EVERY, 0, 2 * marks.EVERY + 1):
        (row,) = found.rows(n, 1)
        assert (row.label, row.extra) == (n % 3, {"text": f"line\n{n}"})


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", ": has no header; accepted: .*"),
        ("\n\nlabel\n1\n", ": has no header; .*"),
        ("label,seed\n", " holds no rows; accepted: one or more"),
        ("label,seed\n\n\n", " holds no rows; accepted: one or more"),
        ("label,label\n1,1\n", ": has two columns 'label'; .*"),
        ("x,y,x\n1,1,1\n", ": has two columns 'x'; .*"),
        ("label;seed\n1;2\n", ": has columns parted by semicolons; accepted: commas"),
        ("label\tseed\n1\t2\n", ": has columns parted by tabs; accepted: commas"),
        (",label\n0,1\n", ": has a column without a name, .*index=False.*"),
        ("label, seed\n1,2\n", ": has a column ' seed'; accepted: 'seed', in small letters"),
        ("Label\n1\n", ": has a column 'Label'; accepted: 'label', in small letters"),
        ("label,steps\n1,50\n", ": has a column 'steps': .* same for all images .*"),
        ("label,eta\n1,0\n", ": has a column 'eta': .* same for all images .*"),
        ("label\n1\n\n2\n", r", row 1 \(line 3\): is blank, but rows follow in line 4"),
        ("label,x\n1,a\n2\n", r", row 1 \(line 3\): has 1 field; accepted: 2, .*\(label, x\)"),
        ("label,x\n1,a,b\n", r", row 0 \(line 2\): has 3 fields; accepted: 2, .*"),
        ('label\n1\n"2\n3\n', r", row 1 \(line \d\): is no row of CSV: a quote .* never closed"),
        ('label\n1\n"2"3\n', r", row 1 \(line 3\): is no row of CSV: .*"),
        ("label\n1\n2\r3\n", r", row 1 \(line 3\): is no row of CSV: a carriage return .*"),
        ("label\n1\n\0\n", r", row 1 \(line 3\): holds a zero byte; accepted: text in UTF-8"),
        ('label,x\n1,"' + "x\n" * 2**20, r", row 0 \(line \d+\): .*"),
        ("label,x\n1," + "x" * 2**21, r", row 0 \(line 2\): is longer than 1048576 bytes, .*"),
        (b"label\n1\n\xff\n", r", row 1 \(line 3\): is no text in UTF-8: .*"),
        (b"\xff\xfel\0a\0b\0", ": has a header that .*"),
    ],
)
def test_what_is_no_table(tmp_path: Path, content: str | bytes, line: str) -> None:
    refused(written(tmp_path, "a.csv", content), line)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("cat,,", "label must be one of circle, square, star or none; got 'cat'"),
        ("3,,", "label must be one of circle, square, star or none; got '3'"),
        ("-1,,", "label must be .*; got '-1'"),
        (",,", "label must be .*; got ''"),
        ("1.0,,", "label must be .*; got '1.0'"),
        ("1,1.5,", "seed must be an integer of 64 bits, or empty; got '1.5'"),
        ("1,1_0,", "seed must be an integer .*; got '1_0'"),
        ("1,18446744073709551616,", "seed must fit in 64 bits; got 18446744073709551616"),
        ("1,-9223372036854775809,", "seed must fit in 64 bits; got -9223372036854775809"),
        (f"1,{'9' * 5000},", "seed must be an integer of 64 bits, or empty; got '9*'?"),
        ("1,,nan", "guidance must be finite, .*; got nan"),
        ("1,,-inf", "guidance must be finite, .*; got -inf"),
        ("1,,1e39", r"guidance must be finite, .*; got 1e\+39"),
        ("1,,much", "guidance must be a finite number, or empty; got 'much'"),
        ("1,,1_0", "guidance must be a finite number, or empty; got '1_0'"),
    ],
)
def test_a_bad_value_names_its_row(tmp_path: Path, value: str, line: str) -> None:
    content = f'label,seed,guidance,note\n0,1,2,"two\nlines"\n{value},\n'
    refused(written(tmp_path, "a.csv", content), rf", row 1 \(line 4\): {line}")


def test_seeds_have_the_samplers_range(tmp_path: Path) -> None:
    seeds = [0, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), "+5", "007"]
    content = "".join(f"0,{seed}\n" for seed in seeds)
    rows = table_of(written(tmp_path, "a.csv", f"label,seed\n{content}")).rows(0, len(seeds))
    expected = [0, -1, 2**63 - 1, -(2**63), -1, -(2**63), 5, 7]
    assert [row.seed for row in rows] == expected
