"""Batches of one size, in which every image of a shard is wanted once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepfuse.engine.generate.conditions.batches import Batch, batches
from stepfuse.engine.generate.conditions.row import Row

GUIDANCE = st.one_of(st.none(), st.sampled_from([0.0, -0.0, 1.0, 1.5, -3.0, 7.5]))


def rows_of(*guidance: float | None) -> list[Row]:
    """Rows with nothing but a guidance."""
    return [Row(guidance=scale) for scale in guidance]


def test_images_follow_each_other() -> None:
    assert batches(rows_of(*[None] * 5), 10, 2) == [
        Batch((10, 11), 2),
        Batch((12, 13), 2),
        Batch((14, 15), 1),
    ]


def test_images_are_sorted_by_guidance() -> None:
    found = batches(rows_of(3.0, 1.5, None, 3.0, 1.5, 3.0, 3.0), 100, 3)
    assert found == [
        Batch((102, 102, 102), 1, None),
        Batch((101, 104, 104), 2, 1.5),
        Batch((100, 103, 105), 3, 3.0),
        Batch((106, 106, 106), 1, 3.0),
    ]
    assert found[1].kept == (101, 104)


def test_no_images_are_no_batches() -> None:
    assert batches([], 4, 8) == []


@given(st.lists(GUIDANCE, max_size=60), st.integers(0, 2**40), st.integers(1, 9))
def test_every_image_is_kept_once(guidance: list[float | None], first: int, size: int) -> None:
    found = batches(rows_of(*guidance), first, size)
    kept = Counter(n for batch in found for n in batch.kept)
    assert kept == Counter(range(first, first + len(guidance)))
    for batch in found:
        assert len(batch.numbers) == size
        assert 1 <= batch.keep <= size
        assert all(guidance[n - first] == batch.guidance for n in batch.kept)
        assert list(batch.kept) == sorted(batch.kept)
    distinct = len(set(guidance))
    full = sum(batch.keep == size for batch in found)
    assert len(found) - full <= distinct
    if any(scale is not None for scale in guidance):
        assert all(first <= n < first + len(guidance) for batch in found for n in batch.numbers)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_an_image(size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {size}"):
        batches(rows_of(None), 0, size)
