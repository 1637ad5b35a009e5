"""Timestep spacing: two libraries' rules for many S, and properties that hold for any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepfuse import spaced_timesteps
from stepfuse.engine.sampling.timesteps import check_timesteps

SPACINGS = ("leading", "trailing", "linspace", "quadratic")
# with 48, halves to round; with 61, a stride that gives diffusers one index too many, -1
MANY = [1, 2, 3, 4, 5, 7, 10, 11, 20, 25, 30, 33, 48, 50, 61, 64, 77, 100, 128, 250, 333, 501, 999]


def theirs(total: int, steps: int, **settings: object) -> list[int]:
    from diffusers import DDIMScheduler, DDPMScheduler

    chosen: list[list[int]] = []
    for kind in (DDIMScheduler, DDPMScheduler):
        scheduler = kind(num_train_timesteps=total, **settings)
        scheduler.set_timesteps(steps)
        chosen.append(scheduler.timesteps.tolist())
    assert chosen[0] == chosen[1]
    return chosen[0]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_equals_diffusers(spacing: str) -> None:
    for total in (1000, 50):
        for steps in (s for s in [*MANY, total] if s <= total):
            expected = theirs(total, steps, timestep_spacing=spacing)
            if expected[-1] < 0:
                expected.pop()
            assert spaced_timesteps(total, steps, spacing) == expected, (total, steps)


@pytest.mark.parametrize("total", [1000, 997, 50])
def test_equals_diffusers_rounding_for_every_number_of_steps(total: int) -> None:
    for steps in range(1, total + 1):
        trailing = np.round(np.arange(total, 0, -total / steps)).astype(int) - 1
        assert spaced_timesteps(total, steps, "trailing") == trailing[trailing >= 0].tolist()
        linspace = np.linspace(0, total - 1, steps).round().astype(int)[::-1]
        assert spaced_timesteps(total, steps, "linspace") == linspace.tolist()


def test_equals_diffusers_with_an_offset() -> None:
    for steps in MANY:
        expected = theirs(1000, steps, timestep_spacing="leading", steps_offset=1)
        assert spaced_timesteps(1000, steps, "leading", steps_offset=1) == expected


def test_an_offset_past_the_end_is_refused() -> None:
    # diffusers gives index 1000 of 0 .. 999 here
    assert theirs(1000, 1000, timestep_spacing="leading", steps_offset=1)[0] == 1000
    for steps, offset, largest in ((1000, 1, 0), (50, 999, 19), (50, 20, 19), (333, 5, 3)):
        message = rf"steps_offset must be in 0 \.\. {largest} for {steps} of 1000.*got {offset}"
        with pytest.raises(ValueError, match=message):
            spaced_timesteps(1000, steps, "leading", steps_offset=offset)
        assert len(spaced_timesteps(1000, steps, "leading", steps_offset=largest)) == steps


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [800, 600, 400, 200, 0]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("linspace", [999, 749, 500, 250, 0]),
        ("quadratic", [999, 561, 249, 62, 0]),
    ],
)
def test_five_of_a_thousand(spacing: str, expected: list[int]) -> None:
    assert spaced_timesteps(1000, 5, spacing) == expected


def test_quadratic_is_dense_near_the_data_and_deduplicated() -> None:
    for steps in (2, 10, 50, 100, 400):
        last = (steps - 1) ** 2
        expected = {int(np.floor(999 * i**2 / last + 1e-9)) for i in range(steps)}
        assert spaced_timesteps(1000, steps, "quadratic") == sorted(expected, reverse=True)
    assert len(spaced_timesteps(1000, 50, "quadratic")) == 49  # indices 0 and 0.4 meet
    strides = -np.diff(spaced_timesteps(1000, 20, "quadratic"))
    assert (np.diff(strides) <= 1).all()
    assert strides[0] > 5 * strides[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
        ("5", [0, 250, 500, 749, 999]),
        ("ddim10", list(range(0, 1000, 100))),
        ("ddim1000", list(range(1000))),
        ("1", [0]),
        ("1000", list(range(1000))),
    ],
)
def test_guided_diffusion_strings(text: str, expected: list[int]) -> None:
    assert spaced_timesteps(1000, text) == expected[::-1]


def section(start: int, size: int, count: int) -> list[int]:
    """One section, as improved DDPM counts it: a running sum, rounded."""
    stride = 1.0 if count == 1 else (size - 1) / (count - 1)
    places, position = [], 0.0
    for _ in range(count):
        places.append(start + round(position))
        position += stride
    return places


@pytest.mark.parametrize("counts", [(10, 15, 20), (1, 1), (3,), (334, 333, 333), (90, 60, 60, 20)])
def test_sections(counts: Sequence[int]) -> None:
    sizes = [1000 // len(counts) + (i < 1000 % len(counts)) for i in range(len(counts))]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    expected = [
        place
        for start, size, count in zip(starts, sizes, counts, strict=True)
        for place in section(start, size, count)
    ]
    ours = spaced_timesteps(1000, ",".join(map(str, counts)))
    assert ours == sorted(expected, reverse=True)
    assert len(ours) == sum(counts)


def test_the_sections_of_the_adm_string() -> None:
    ours = spaced_timesteps(1000, "10,15,20")[::-1]
    assert len(ours) == 45
    assert (ours[0], ours[9], ours[10], ours[24], ours[25], ours[-1]) == (
        0,
        333,
        334,
        666,
        667,
        999,
    )


@given(
    total=st.integers(1, 3000),
    data=st.data(),
    spacing=st.sampled_from(SPACINGS),
)
@settings(max_examples=200, deadline=None)
def test_descending_unique_in_range(total: int, data: st.DataObject, spacing: str) -> None:
    steps = data.draw(st.integers(1, total))
    past_the_last = total - 1 - (steps - 1) * (total // steps)
    offset = data.draw(st.integers(0, past_the_last)) if spacing == "leading" else 0
    chosen = spaced_timesteps(total, steps, spacing, offset)
    assert chosen == sorted(set(chosen), reverse=True)
    assert 0 <= chosen[-1] <= chosen[0] < total
    assert 1 <= len(chosen) <= steps
    if spacing != "quadratic":
        assert len(chosen) == steps  # only that one can meet an index twice
    assert check_timesteps(chosen, total) == chosen


@given(total=st.integers(1, 2000), data=st.data())
@settings(max_examples=100, deadline=None)
def test_strings_space_exactly_as_many_as_they_say(total: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, total))
    chosen = spaced_timesteps(total, str(steps))
    assert len(chosen) == steps
    assert chosen[-1] == 0
    assert chosen[0] == (total - 1 if steps > 1 else 0)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, r"1 \.\. 1000 .*got 0"),
        (-1, "got -1"),
        (1001, "got 1001"),
        ("ddim300", "no whole stride over 1000 timesteps gives 'ddim300'"),
        ("ddim0", "at least 1"),
        ("ddim10,20", "no whole stride"),
        ("ddim1", "no whole stride over 1000 timesteps gives 'ddim1'"),  # it would be index 0
        ("0", "at least 1"),
        ("1001", "section 0 of '1001' has 1000 timesteps, not 1001"),
        ("10,600", "section 1 .* has 500 timesteps, not 600"),
        ("", "'50', '10,15,20' or 'ddim50'; got ''"),
        ("ten", "got 'ten'"),
        ("ddim", "got 'ddim'"),
        ("10,,20", "got '10,,20'"),
    ],
)
def test_steps_that_are_refused(steps: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [10.0, True, None, [10]])
def test_steps_of_another_type_are_refused(steps: object) -> None:
    with pytest.raises(TypeError, match="int or a string"):
        spaced_timesteps(1000, steps)  # type: ignore[arg-type]


def test_a_whole_stride_leaves_more_than_one_index() -> None:
    for total in (1, 2, 7, 1000):
        with pytest.raises(ValueError, match="no whole stride"):
            spaced_timesteps(total, "ddim1")
    assert spaced_timesteps(3, "ddim2") == [2, 0]
    assert spaced_timesteps(1000, "ddim2") == [500, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1000, 10, "leading", 0.5), TypeError, r"steps_offset must be an int; got float 0\.5"),
        ((1000, 10, "leading", 1.0), TypeError, r"steps_offset must be an int; got float 1\.0"),
        ((1000, 10, "leading", True), TypeError, "steps_offset must be an int; got bool True"),
        ((1000, "10", "leading", 0.5), TypeError, "steps_offset must be an int; got float"),
        ((1000, "10", "leading", 5000), ValueError, r"steps_offset must be in 0 \.\. 999"),
        ((1000, "10", "even"), ValueError, "spacing must be one of .*got 'even'"),
        ((1000.0, 10), TypeError, "num_train_timesteps must be an int; got float"),
        ((True, 1), TypeError, "num_train_timesteps must be an int; got bool"),
        ((0, "1"), ValueError, "num_train_timesteps must be at least 1; got 0"),
        ((1000, np.float64(10)), TypeError, "int or a string"),
    ],
)
def test_numbers_that_are_refused(
    arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spaced_timesteps(*arguments)  # type: ignore[arg-type]


def test_integers_of_numpy_are_integers() -> None:
    chosen = spaced_timesteps(np.int64(1000), np.int32(5), "leading", np.uint8(1))
    assert chosen == [801, 601, 401, 201, 1]
    assert all(type(t) is int for t in chosen)


@pytest.mark.parametrize("offset", [-1, 1000])
def test_offsets_that_are_refused(offset: int) -> None:
    with pytest.raises(ValueError, match=rf"0 \.\. 999; got {offset}"):
        spaced_timesteps(1000, 10, "leading", offset)


def test_an_unknown_spacing_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="leading, trailing, linspace, quadratic; got 'even'"):
        spaced_timesteps(1000, 10, "even")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "at least one"),
        ([5, 5, 1], "descend without repetition"),
        ([1, 5], "descend without repetition"),
        ([1000, 1], r"0 \.\. 999; got 1 \.\. 1000"),
        ([5, -1], r"got -1 \.\. 5"),
        ([5.5, 1], "whole numbers"),
        ([float("nan"), 1], "timesteps must be finite.*got nan"),
        ([float("inf"), 1], "timesteps must be finite.*got inf"),
    ],
)
def test_a_callers_timesteps_that_are_refused(timesteps: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_timesteps(timesteps, 1000)


@pytest.mark.parametrize("timesteps", [["5"], [True], [None], [torch.tensor(True)], [5 + 0j]])
def test_a_callers_timesteps_of_another_type(timesteps: list[int]) -> None:
    with pytest.raises(TypeError, match="timesteps must be an int or a float; got"):
        check_timesteps(timesteps, 1000)


def test_a_callers_timesteps_may_come_from_arrays() -> None:
    for given_as in (torch.tensor([9, 4, 0]), np.array([9, 4, 0]), np.array([9.0, 4.0, 0.0])):
        chosen = check_timesteps(list(given_as), 10)
        assert chosen == [9, 4, 0]
        assert all(type(t) is int for t in chosen)
