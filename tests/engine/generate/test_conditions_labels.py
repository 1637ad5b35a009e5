"""Labels without a file: pure functions of an image's number."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.generate.conditions_case import NAMES

from stepfuse.engine.cli import drawing
from stepfuse.engine.cli.sample_options import SampleOptions
from stepfuse.engine.generate.conditions import labels as module
from stepfuse.engine.generate.conditions.choosing import choose, from_settings
from stepfuse.engine.generate.conditions.classes import Classes
from stepfuse.engine.generate.conditions.labels import (
    STREAM,
    Fixed,
    Labels,
    NoClasses,
    PerClass,
    Random,
    Turn,
    choose_labels,
)
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.kernels import philox

OPTIONS = SampleOptions(
    "tiny", 12, "5", "ddim", "leading", 0, None, None, None, 1, (), 0, 0, None, "auto", "off",
    "cpu", None, None, None,
)  # fmt: skip
ALL = (
    Turn((0, 1, 2)),
    Turn((2, 3)),
    PerClass((0, 1, 2), 5),
    Random(10, 7),
    Random(1000, -1),
    Fixed(3),
    NoClasses(),
)
# of a chi-squared with 9 degrees of freedom, one in a hundred thousand is above it
CHI_SQUARED = 39.3


@pytest.mark.parametrize("asked", [(), ("star",), ("star", "none", "0"), ("none", "1")])
@pytest.mark.parametrize("first", [0, 1, 1000, 2**40])
def test_labels_are_those_of_sample(asked: tuple[str, ...], first: int) -> None:
    checkpoint: Any = SimpleNamespace(num_classes=len(NAMES), labels=NAMES)
    options = replace(OPTIONS, labels=asked, first_index=first)
    theirs = drawing.choose_labels(options, checkpoint)
    assert theirs is not None
    rows = choose_labels(asked, NAMES).rows(first, options.count)
    assert [row.label for row in rows] == theirs.tolist()


def test_a_row_of_labels_has_nothing_else() -> None:
    (row,) = Turn((0, 1, 2)).rows(4, 1)
    assert (row.label, row.seed, row.guidance, row.extra) == (1, None, None, {})


def test_per_class_is_in_blocks() -> None:
    assert PerClass((0, 1, 2), 2).labels(3, 6) == [1, 2, 2, 0, 0, 1]
    assert choose_labels("turn", NAMES, per_class=4) == PerClass((0, 1, 2), 4)
    assert choose_labels(["star", "none"], NAMES, per_class=4) == PerClass((2, 3), 4)


@pytest.mark.parametrize("labels", ALL, ids=repr)
@given(first=st.integers(0, 2**40), count=st.integers(0, 40), cut=st.integers(0, 40))
def test_any_range_is_cut_from_the_same_row(
    labels: Labels, first: int, count: int, cut: int
) -> None:
    cut = min(cut, count)
    parts = labels.rows(first, cut) + labels.rows(first + cut, count - cut)
    assert labels.rows(first, count) == parts


@pytest.mark.parametrize("labels", ALL, ids=repr)
def test_settings_give_the_same_labels(labels: Labels) -> None:
    again = from_settings(json.loads(json.dumps(labels.settings())))
    assert again == labels
    assert again.rows(5, 20) == labels.rows(5, 20)
    labels.check(10**12)


def test_random_labels_are_the_formula() -> None:
    """In exact integers, from words that are known to be those of the paper."""
    images = torch.tensor([0, 1, 2**31, 2**40 + 3])
    words = philox.integers(99, images, STREAM, (2,)).tolist()
    for classes in (1, 2, 10, 1000, 2**31 - 1):
        exact = [((a << 32) + b) * classes >> 64 for a, b in words]
        found = [Random(classes, 99).labels(n, 1)[0] for n in images.tolist()]
        assert found == exact


def test_random_labels_are_pinned() -> None:
    """What a job of an earlier version has drawn is drawn again; computed without this package."""
    assert Random(10, 0).labels(0, 16) == [7, 9, 6, 0, 9, 4, 2, 6, 2, 5, 6, 7, 4, 5, 3, 9]
    assert Random(1000, 2**63 + 5).labels(2**40, 4) == [924, 469, 867, 354]


def test_random_labels_are_uniform_and_differ_by_seed() -> None:
    drawn = torch.tensor(Random(10, 3).labels(0, 20_000))
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert float(((counts - 2000.0) ** 2 / 2000).sum()) < CHI_SQUARED
    neighbours = torch.bincount(drawn[:-1] * 10 + drawn[1:], minlength=100)
    assert int(neighbours.min()) > 100
    assert Random(10, 3).labels(0, 50) != Random(10, 4).labels(0, 50)


def test_no_noise_is_drawn_from_the_stream_of_labels() -> None:
    """Its number is none that a timestep can have, and not that of the initial x_T."""
    assert STREAM != philox.INITIAL
    assert STREAM <= philox.INITIAL
    with pytest.raises(ValueError, match="num_train_timesteps"):
        Schedule.linear(STREAM)


def test_an_unsigned_seed_is_its_64_bits() -> None:
    assert Random(10, 2**64 - 1).labels(0, 30) == Random(10, -1).labels(0, 30)


@pytest.mark.parametrize(
    ("labels", "names", "per_class", "line"),
    [
        ("shuffled", NAMES, None, "--labels must be one of turn, random; got 'shuffled'"),
        (["cat"], NAMES, None, "--label must be one of circle, square, star or none; got 'cat'"),
        (["3"], NAMES, None, "--label must be one of circle, square, star or none; got '3'"),
        (["9" * 5000], NAMES, None, "--label must be one of .*"),
        (["40"], [f"k{n}" for n in range(30)], None, r".* a class name, 0 \.\. 29 or none; .*"),
        ("random", NAMES, 5, "--per-class 5 does not go with --labels random, .*"),
        ("turn", NAMES, 0, "images per class must be at least 1; got 0"),
        ("random", (), None, "--labels random: the model has no classes"),
        ("turn", (), 3, "--per-class 3: the model has no classes"),
        (["none", "star"], (), None, "--label star: the model has no classes"),
    ],
)
def test_what_cannot_be_meant(labels: Any, names: Any, per_class: int | None, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        choose_labels(labels, names, per_class=per_class)


@pytest.mark.parametrize("labels", [None, (), "turn", ["none"], ["none", "none"]])
def test_a_model_without_classes(labels: Any) -> None:
    assert choose(names=(), labels=labels).rows(3, 1)[0].label is None


def test_one_label_is_fixed() -> None:
    assert choose_labels(["none"], NAMES) == Fixed(3)
    assert choose_labels(["random", "turn"], ("turn", "random")) == Turn((1, 0))


def test_a_name_goes_before_a_number() -> None:
    classes = Classes(("1", "0", "1"))
    assert [classes.number(text, "label") for text in ("0", "1", "2", "none")] == [1, 0, 2, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Turn(()),
        lambda: Turn((-1,)),
        lambda: Fixed(-1),
        lambda: PerClass((1,), 0),
        lambda: Random(0, 0),
        lambda: Random(2**31, 0),
        lambda: Random(3, 2**64),
        lambda: Turn((1,)).rows(-1, 2),
        lambda: Turn((1,)).rows(0, -2),
        lambda: Turn((1,)).check(-1),
    ],
)
def test_numbers_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match=r"; got (-|none|\d)"):
        make()


def test_settings_of_another_kind() -> None:
    with pytest.raises(ValueError, match=r"kind of labels must be one of .*; got 'moon'"):
        module.labels_from({"kind": "moon"})
