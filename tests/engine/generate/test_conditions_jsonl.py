"""JSON Lines: objects of any keys, and nothing that JSON does not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.generate.conditions_case import everything, refused, table_of, written

from stepfuse.engine.generate.conditions import table
from stepfuse.engine.generate.conditions.labels import Turn

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def test_values_keep_their_types(tmp_path: Path) -> None:
    lines = (
        '{"label": 2, "seed": 18446744073709551615, "guidance": 3, "size": [1, {"a": null}]}\n'
        '{"label": "none", "guidance": null}\r\n'
        '{"note": true, "label": "1", "seed": "5", "guidance": 0.5}'
    )
    found = table_of(written(tmp_path, "a.jsonl", lines))
    assert everything(found) == [
        (2, -1, 3.0, {"size": [1, {"a": None}]}),
        (3, None, None, {}),
        (1, 5, 0.5, {"note": True}),
    ]
    assert found.index.facts.columns == ("label", "seed", "guidance", "size")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    values=st.lists(VALUES, min_size=1, max_size=30),
    ascii_=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    ending=st.sampled_from(["", "\n", "\n\n \n"]),
    bom=st.booleans(),
    every=st.integers(1, 5),
)
def test_what_is_passed_through_comes_back(
    tmp_path: Path,
    values: list[object],
    ascii_: bool,
    end: str,
    ending: str,
    bom: bool,
    every: int,
) -> None:
    lines = [json.dumps({"any thing": v, "label": 1}, ensure_ascii=ascii_) for v in values]
    content = ("\ufeff" if bom else "") + end.join(lines) + ending
    path = written(tmp_path, "a.ndjson", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "EVERY", every)
        found = table_of(path)
    assert everything(found) == [(1, None, None, {"any thing": value}) for value in values]
    for n in range(len(values) - 1, -1, -1):
        assert found.rows(n, 1)[0].extra == {"any thing": values[n]}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[1, 2]", r'must be an object, \{"label": 3\} say; got \[1, 2\]'),
        ("3", "must be an object, .*; got 3"),
        ("null", "must be an object, .*; got null"),
        ('"label"', 'must be an object, .*; got "label"'),
        ('{"label": 1', "is no JSON: .*"),
        ("{'label': 1}", "is no JSON: .*"),
        ('{"label": 1} {"label": 2}', "is no JSON: .*"),
        ('{"label": 1, "x": NaN}', "is no JSON: NaN is no number of JSON"),
        ('{"label": 1, "guidance": -Infinity}', "is no JSON: -Infinity is no number of JSON"),
        ('{"label": 1, "x": [1e999]}', "is no JSON: 1e999 is too large for a number"),
        ('{"label": 1, "label": 2}', "is no JSON: 'label' is there twice"),
        ('{"label": 1, "x": {"y": 1, "y": 2}}', "is no JSON: 'y' is there twice"),
        ('{"label": 1, "x": ' + "[" * 100_000, "is no JSON: .*"),
        ('{"label": 1, "x": ' + "9" * 5000 + "}", "is no JSON: .*"),
        ('{"label": true}', "label must be text or an integer: .*; got True"),
        ('{"label": 1.0}', "label must be text or an integer: .*; got 1.0"),
        ('{"label": null}', "label must be text or an integer: .*none; got None"),
        ('{"label": -1}', "label must be one of .*; got '-1'"),
        ('{"label": 1, "seed": 1.0}', "seed must be an integer of 64 bits, or empty; got 1.0"),
        ('{"label": 1, "seed": false}', "seed must be an integer .*; got False"),
        ('{"label": 1, "guidance": true}', "guidance must be a finite number, .*; got True"),
        ('{"label": 1, "guidance": "nan"}', "guidance must be finite, .*; got nan"),
        ('{"label": 1, "guidance": 1' + "0" * 400 + "}", "guidance must be finite, .*"),
        ('{"label": 1, "eta": 0.5}', "has a column 'eta': .*"),
        ('{"label": 1, "SEED": 5}', "has a column 'SEED'; accepted: 'seed', .*"),
        ('{"seed": 5}', "has no label, which the rows before it have; .*"),
        ("{}", "has no label, which the rows before it have; .*"),
    ],
)
def test_what_is_no_row(tmp_path: Path, line: str, why: str) -> None:
    path = written(tmp_path, "a.jsonl", f'{{"label": 0}}\n{line}\n{{"label": 1}}\n')
    refused(path, rf", row 1 \(line 2\): {why}")


def test_a_blank_line_in_the_middle(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"label": 0}\n \n\n{"label": 1}\n')
    refused(path, r", row 1 \(line 2\): is blank, but rows follow in line 4")


def test_labels_in_some_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"seed": 0}\n{"label": 1}\n')
    refused(path, r", row 1 \(line 2\): has a label, which the rows before it lack; .*")


def test_rows_without_labels_take_other_ones(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"seed": 8}\n{}\n{"x": 1}\n')
    found = table_of(path, per_row=2, otherwise=Turn((0, 1, 2)))
    assert everything(found) == [
        (0, 8, None, {}),
        (1, 8, None, {}),
        (2, None, None, {}),
        (0, None, None, {}),
        (1, None, None, {"x": 1}),
        (2, None, None, {"x": 1}),
    ]
