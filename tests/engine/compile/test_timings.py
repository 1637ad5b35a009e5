"""Times that are noted and given again: the same decisions, whatever a stopwatch would say."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepfuse as sf
from stepfuse.engine.compile import timings as module
from stepfuse.engine.compile.passes import convolution_forms
from stepfuse.engine.compile.stopwatch import trial
from stepfuse.engine.compile.timings import TimingMissing, Timings, answer

calls: list[tuple[Any, ...]] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()
    measured.cache_clear()  # type: ignore[attr-defined]


@trial
def measured(*args: Any) -> list[float]:
    calls.append(args)
    return [float(len(calls)), math.inf]


def test_what_is_recorded_is_replayed_without_a_measurement() -> None:
    timings = Timings()
    with timings.recording():
        first = measured((1, 2), torch.float32, functools.partial(min, 3), max, None)
    assert first == [1.0, math.inf]
    assert len(calls) == 1
    measured.cache_clear()  # type: ignore[attr-defined]
    again = Timings.from_json(timings.to_json())
    with again.replaying():
        assert measured((1, 2), torch.float32, functools.partial(min, 3), max, None) == first
    assert len(calls) == 1
    assert again.results == timings.results


def test_what_was_measured_before_is_recorded_too() -> None:
    measured(1)
    timings = Timings()
    with timings.recording():
        measured(1)
    assert len(calls) == 1
    assert len(timings.results) == 1


def test_a_replay_does_not_hear_of_what_this_process_has_measured() -> None:
    measured(1)
    timings = Timings()
    name = f"{__name__}.measured(1)"
    timings.results[name] = [7.0]
    with timings.replaying():
        assert measured(1) == [7.0]
    assert measured(1) == [1.0, math.inf]


def test_a_missing_trial_is_named_and_passes_whatever_catches_errors() -> None:
    timings = Timings()

    def ask() -> None:
        with timings.replaying(), contextlib.suppress(Exception):  # as `rewrite` does with passes
            measured(5)

    with pytest.raises(TimingMissing, match=r"measured\(5\) is not among the 0 noted"):
        ask()
    assert calls == []


def test_missing_trials_may_be_measured_and_noted() -> None:
    timings = Timings()
    with timings.replaying("measure"):
        assert measured(5) == [1.0, math.inf]
        assert measured(5) == [1.0, math.inf]
    assert len(timings.results) == 1
    never = timings.replaying("never")  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match="missing must be one of error, measure; got 'never'"),
        never,
    ):
        pass


def test_another_thread_measures_as_ever() -> None:
    timings = Timings()
    with timings.replaying():
        thread = threading.Thread(target=measured, args=(9,))
        thread.start()
        thread.join()
    assert calls == [(9,)]


def test_arguments_that_have_no_name_are_refused() -> None:
    with Timings().recording(), pytest.raises(TypeError, match="numbers, words and functions"):
        answer(measured, (object(),), lambda: 1.0)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "machine": {}, "seconds": {"a": "b"}}',
     '{"format": 1, "machine": 3, "seconds": {}}'],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no timings of trials"):
        Timings.from_json(text)


def test_json_is_the_same_for_the_same_and_holds_no_infinity() -> None:
    timings = Timings()
    timings.results = {"b": math.inf, "a": [1e-5, math.inf]}
    text = timings.to_json()
    assert json.loads(text)["seconds"] == {"a": [1e-5, None], "b": None}
    assert Timings.from_json(text).to_json() == text


def test_another_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = Timings()
    assert timings.differences() == {}
    monkeypatch.setattr(module, "isa", lambda: "abacus")
    assert timings.differences() == {"isa": (timings.machine["isa"], "abacus")}


def backwards(times: Callable[..., Any]) -> Callable[..., Any]:
    """A stopwatch that prefers whatever the real one does not."""

    def reversed_times(*args: Any, **kwargs: Any) -> list[float]:
        return [1.0 / t for t in times(*args, **kwargs)]

    return reversed_times


def test_one_plan_gives_one_network_under_opposite_timings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Acceptance 14: the form of every layer is decided by the plan, not by the stopwatch."""
    digits = sf.load("digits")
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([3, 500])
    labels = torch.tensor([1, 2])
    inputs = (x, t, {"labels": labels})
    timings = Timings()
    with timings.recording():
        first = sf.optimize(digits.model, inputs)
    assert timings.results
    real = convolution_forms.best_times
    monkeypatch.setattr(convolution_forms, "best_times", backwards(real))
    for seconds in (convolution_forms._seconds,):
        seconds.cache_clear()  # type: ignore[attr-defined]
    try:
        opposite = sf.optimize(digits.model, inputs)
        with Timings.from_json(timings.to_json()).replaying():
            second = sf.optimize(digits.model, inputs)
    finally:
        convolution_forms._seconds.cache_clear()  # type: ignore[attr-defined]
    notes = [
        next(r.note for r in fast.reports if r.name == "convolution_forms")
        for fast in (first, second, opposite)
    ]
    assert notes[0] == notes[1] != notes[2]
    assert torch.equal(first(x, t, labels=labels), second(x, t, labels=labels))


def test_a_plan_without_a_shape_names_it() -> None:
    digits = sf.load("digits")
    timings = Timings()
    with timings.recording():
        sf.optimize(digits.model, (torch.randn(2, 1, 32, 32), torch.tensor([3, 500])))
    with pytest.raises(TimingMissing, match=r"_seconds\(\(+3, "), timings.replaying():
        sf.optimize(digits.model, (torch.randn(3, 1, 32, 32), torch.tensor([3, 500, 1])))
