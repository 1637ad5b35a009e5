"""What users' solvers and guidances do, and what the sampler must not take for granted."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.sampling.lint import check_capturable
from stepfuse.engine.sampling.steps import Steps
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.step_row import Column

SCHEDULE = sf.Schedule.linear()
SHAPE = (2, 3, 4, 5)
GAIN = 1.0


def build(guidance: Any = None, model: Any = None, **settings: Any) -> sf.Sampler:
    return sf.Sampler(model or Bumpy(), SCHEDULE, guidance=guidance, **{"steps": 6, **settings})


def labelled(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    shift = 0.0 if label is None else label.to(torch.float32).view(-1, 1, 1, 1) * 0.1
    return torch.sin(x) * 0.5 + shift


def drawn(sampler: sf.Sampler, *labels: int) -> Tensor:
    condition = {"label": torch.tensor(labels)} if labels else None
    return sampler.sample(SHAPE, seed=3, condition=condition)


def test_inference_mode_follows_the_condition() -> None:
    """There, operators that may copy count as views, and did copy."""
    captured, eager = build(model=labelled), build(model=labelled, graph=None)
    with torch.inference_mode():
        drawn(captured, 1, 2)
        assert torch.equal(drawn(captured, 5, 9), drawn(eager, 5, 9))
    assert captured.stats()["replays"] == 12


class Mixed:
    """CFG by the protocol, its scale an attribute."""

    evaluations = 2
    mixture = True
    scale, above = 2.0, -1

    def __init__(self, unconditional: Any) -> None:
        self.unconditional = unconditional

    def scale_at(self, t: int) -> float:
        return self.scale

    def is_active(self, t: int) -> bool:
        return t > self.above

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
        unguided = denoiser(x, t, denoiser.unconditional)
        return sf.Outputs(denoiser(x, t, condition), unguided)


NOTHING = {"label": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize("graph", [None, "auto"])
@pytest.mark.parametrize("change", [{"scale": 6.0}, {"above": 500}])
def test_another_scale_of_the_same_object(change: dict[str, Any], graph: Any) -> None:
    guidance = Mixed(NOTHING)
    guided = build(guidance, labelled, graph=graph)
    before = drawn(guided, 1, 2)
    vars(guidance).update(change)
    fresh = build(guidance, labelled, graph=graph)
    assert torch.equal(drawn(guided, 1, 2), drawn(fresh, 1, 2))
    assert not torch.equal(drawn(guided, 1, 2), before)
    assert guided.num_function_evaluations == fresh.num_function_evaluations


class Amplified(sf.CFG):
    """A CFG with outputs of its own."""

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
        made = super().outputs(denoiser, x, t, condition)
        return sf.Outputs(made.model * GAIN, made.unguided)


class Combined(sf.CFG):
    def combine(self, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        return super().combine(cond, uncond, scale) * GAIN


class Steep(sf.ClassifierGuidance):
    def gradient(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        return super().gradient(x, t, condition) * GAIN


def log_probability(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    return -(x - 0.5).flatten(1).square().sum(1)


@pytest.mark.parametrize(
    "guidance",
    [
        Amplified(2.0, NOTHING),
        Combined(2.0, NOTHING, rescale=0.5),
        Steep(log_probability, 2.0),
    ],
    ids=lambda g: type(g).__name__,
)
def test_what_a_subclass_reads_is_looked_at(guidance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guided = build(guidance, labelled)
    before = drawn(guided, 1, 2)
    monkeypatch.setitem(globals(), "GAIN", 1.3)
    assert torch.equal(drawn(guided, 1, 2), drawn(build(guidance, labelled), 1, 2))
    assert not torch.equal(drawn(guided, 1, 2), before)


def once(denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
    return denoiser(x, t, condition)


def more(denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
    return denoiser(x, t, condition) * 1.3


def test_outputs_that_are_exchanged_are_noticed() -> None:
    guidance = SimpleNamespace(evaluations=1, outputs=once)
    guided = build(guidance)
    drawn(guided)
    guidance.outputs = more
    assert torch.equal(drawn(guided), drawn(build(guidance)))


class Entries(dict[str, float]):
    """A container with an attribute."""

    evaluations = 1
    strength = 1.0

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        made: Tensor = denoiser(x, t, condition) * self.strength
        return made


def test_a_container_has_attributes_too() -> None:
    guidance = Entries()
    guided = build(guidance)
    drawn(guided)
    guidance.strength = 1.3
    assert torch.equal(drawn(guided), drawn(build(guidance)))


class Learned(nn.Module):
    """A guidance that is a module, with a helper that it calls."""

    evaluations = 1

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1), requires_grad=False)

    def amplified(self, output: Tensor) -> Tensor:
        return output * self.gain * GAIN

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        return self.amplified(denoiser(x, t, condition))


def test_a_module_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    guidance = Learned()
    guided = build(guidance)
    before = drawn(guided)
    assert guided.stats()["replays"] == 6
    guidance.gain.fill_(1.3)
    by_weight = drawn(guided)
    assert torch.equal(by_weight, drawn(build(guidance)))
    monkeypatch.setitem(globals(), "GAIN", 0.5)
    assert torch.equal(drawn(guided), drawn(build(guidance)))
    assert not torch.equal(by_weight, before)


@pytest.mark.parametrize("read", [lambda t: t.numpy()[0], lambda t: t.tolist()[0]])
def test_a_copy_to_the_host_is_refused(read: Any) -> None:
    def outputs(denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        gain = 1.3 if 200 <= read(t) <= 700 else 1.0
        made: Tensor = gain * denoiser(x, t, condition)
        return made

    guidance = SimpleNamespace(evaluations=1, outputs=outputs)
    guided = build(guidance)
    assert torch.equal(drawn(guided), drawn(build(guidance, graph=None)))
    assert "copies a tensor to the host" in guided.explain()


def test_the_shift_may_be_x() -> None:
    class Self:
        evaluations = 1

        def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
            return sf.Outputs(denoiser(x, t, condition), shift=x)

    class Copied(Self):
        def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
            return sf.Outputs(denoiser(x, t, condition), shift=x.clone())

    assert torch.equal(drawn(build(Self(), steps=2)), drawn(build(Copied(), steps=2)))


@pytest.mark.parametrize("shift", [0.1, torch.zeros(()), torch.zeros(1, *SHAPE[1:])])
def test_a_shift_that_is_not_like_x(shift: Any) -> None:
    def outputs(denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
        return sf.Outputs(denoiser(x, t, condition), shift=shift)

    guidance = SimpleNamespace(evaluations=1, outputs=outputs)
    with pytest.raises(TypeError, match=r"shift .* must be a tensor like x, \[2, 3, 4, 5\]; got"):
        drawn(build(guidance, graph=None))


def test_without_unconditional_entries_it_is_the_condition() -> None:
    class Same:
        evaluations = 2

        def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
            again = denoiser(x, t, denoiser.unconditional)
            return (denoiser(x, t, condition) + again) / 2

    plain = drawn(build(None, labelled), 1, 2)
    torch.testing.assert_close(drawn(build(Same(), labelled), 1, 2), plain)


class Classes(nn.Module):
    """Knows its classes, as the networks of checkpoints do."""

    label_input = "label"

    def check_labels(self, labels: Tensor) -> None:
        assert isinstance(labels, Tensor)

    def forward(self, x: Tensor, t: Tensor, label: Any = None, text: Any = 0.0) -> Tensor:
        return labelled(x, t, label) + text


def test_labels_that_are_kept_are_no_labels_to_check() -> None:
    for unconditional in ({}, {"text": torch.ones(2, 1, 1, 1)}):
        guided = build(sf.CFG(3.0, unconditional), Classes())
        condition = {"label": torch.tensor([1, 2]), "text": torch.zeros(2, 1, 1, 1)}
        assert guided.sample(SHAPE, condition=condition).isfinite().all()


def test_a_classifier_under_inference_mode() -> None:
    guided = build(sf.ClassifierGuidance(log_probability, 2.0))
    expected = drawn(guided)
    with torch.inference_mode():
        assert torch.equal(drawn(guided), expected)


def doubled(schedule: sf.Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    steps = Steps.down(schedule, timesteps, update)
    steps.implicit(torch.zeros_like(steps.a), torch.zeros_like(steps.a))
    return steps.table.repeat_interleave(2, 0)


def test_rows_that_repeat_do_not_grow() -> None:
    sampler = build(method=sf.Method(doubled))
    assert len(sampler.timesteps) == 12
    for guidance in (sf.CFG(2.0, NOTHING), None):
        sampler.guidance = guidance
        assert len(sampler.timesteps) == 12


def changed(column: Column, value: float) -> sf.Method:
    def rows(schedule: sf.Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
        table = doubled(schedule, timesteps, update)[::2].contiguous()
        table[1, column] = value
        return table

    return sf.Method(rows, name="mine")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (Column.TIMESTEP, -1.0, r"TIMESTEP in 0 \.\. 999; got -1"),
        (Column.TIMESTEP, 1000.0, r"TIMESTEP in 0 \.\. 999; got 1000"),
        (Column.TIMESTEP, 10.5, r"TIMESTEP in 0 \.\. 999; got 10\.5"),
        (Column.TIMESTEP, float("nan"), r"TIMESTEP in 0 \.\. 999; got nan"),
        (Column.CLIP, 0.0, "positive CLIP, inf for none; got 0"),
        (Column.CLIP, float("nan"), "positive CLIP, inf for none; got nan"),
    ],
)
def test_rows_that_say_nonsense(column: Column, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"rows of method 'mine' must have a {message}"):
        build(method=changed(column, value))


def test_rows_are_copied() -> None:
    table = doubled(SCHEDULE, [900, 500, 100], Update())
    sampler = build(method=sf.Method(lambda *_: table, name="mine"))
    before = drawn(sampler)
    table.zero_()
    assert torch.equal(drawn(sampler), before)


def test_a_classifier_needs_a_variance_to_shift_the_mean() -> None:
    method = sf.Method(doubled, shifts_mean=True)
    with pytest.raises(ValueError, match="the rows of this method have none"):
        build(sf.ClassifierGuidance(log_probability, 2.0), method=method)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "3", None])
def test_a_scale_that_is_no_number(scale: Any) -> None:
    guidance = Mixed(NOTHING)
    guidance.scale = scale
    with pytest.raises((TypeError, ValueError), match=r"scale_at\(\d+\) of the guidance"):
        build(guidance, labelled)


def test_a_look_leaves_no_trace_in_the_guidance() -> None:
    class Keeping:
        evaluations = 1
        capturable = False
        last: Tensor | None = None

        def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
            output: Tensor = denoiser(x, t, condition)
            self.last = output if self.last is None else (self.last + output) / 2
            return self.last.clone()

    guidance = Keeping()
    with pytest.raises(RuntimeError):
        check_capturable(build(guidance), SHAPE)
    assert guidance.last is None
    assert drawn(build(guidance)).isfinite().all()
