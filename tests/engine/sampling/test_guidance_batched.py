"""One call of the model with both halves, or two calls: on CUDA and on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.sampling.lint import check_capturable

SHAPE = (2, 3, 4, 4)
LABEL = {"label": torch.tensor([1.0, 4.0])}
TWICE, ONCE_EACH = [4], [2, 2]


class Counting(nn.Module):
    """A model that notes the batches it is called with; some take no more than ``most``."""

    def __init__(self, most: int = 100) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.most = most

    def takes_batch(self, count: int) -> bool:
        return count <= self.most

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        return x * 0.5 if label is None else x * label.view(-1, 1, 1, 1)


def on_cuda(model: Counting, guidance: Any) -> list[int]:
    """The batches of one guided step of a sampler on CUDA, as far as shapes go."""
    sampler = sf.Sampler(model, sf.Schedule.linear(), steps=2, guidance=guidance)
    check_capturable(sampler, SHAPE, LABEL)
    assert model.batches[: len(model.batches) // 2] == model.batches[len(model.batches) // 2 :]
    return model.batches[: len(model.batches) // 2]


def on_cpu(model: Counting, guidance: Any) -> list[int]:
    sampler = sf.Sampler(model, sf.Schedule.linear(), steps=1, guidance=guidance, graph=None)
    sampler.sample(SHAPE, condition=LABEL)
    return model.batches


ZEROS, NONE = {"label": torch.zeros(1)}, {"label": None}


@pytest.mark.parametrize(
    ("guidance", "cuda", "cpu"),
    [
        (sf.CFG(2.0, ZEROS), TWICE, ONCE_EACH),
        (sf.CFG(2.0, ZEROS, batched="auto"), TWICE, ONCE_EACH),
        (sf.CFG(2.0, ZEROS, rescale=0.5), TWICE, ONCE_EACH),
        (sf.CFG(2.0, NONE), ONCE_EACH, ONCE_EACH),
        (sf.CFG(2.0, ZEROS, batched=False), ONCE_EACH, ONCE_EACH),
        (sf.CFG(2.0, ZEROS, batched=True), TWICE, TWICE),
    ],
    ids=["the default", "auto", "rescaled", "no label", "False", "True"],
)
def test_how_often_the_model_is_called(guidance: sf.CFG, cuda: list[int], cpu: list[int]) -> None:
    assert on_cuda(Counting(), guidance) == cuda
    assert on_cpu(Counting(), guidance) == cpu


def test_a_model_that_takes_no_larger_batch_is_called_twice() -> None:
    assert on_cuda(Counting(most=3), sf.CFG(2.0, ZEROS)) == ONCE_EACH
    assert on_cuda(Counting(most=4), sf.CFG(2.0, ZEROS)) == TWICE


class Asking:
    """A user's guidance that asks the same question."""

    evaluations, batched = 2, "auto"

    def __init__(self, unconditional: dict[str, Any]) -> None:
        self.unconditional = unconditional
        self.asked: list[bool] = []

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.asked.append(denoiser.takes_both)
        first: Tensor = denoiser(x, t, condition)
        return first


@pytest.mark.parametrize(("unconditional", "takes"), [(ZEROS, True), (NONE, False)])
def test_a_users_guidance_is_told(unconditional: dict[str, Any], takes: bool) -> None:
    guidance = Asking(unconditional)
    on_cpu(Counting(), guidance)
    assert guidance.asked == [takes]


@pytest.mark.parametrize(
    ("batched", "error"), [("always", ValueError), (1, TypeError), (None, TypeError)]
)
def test_what_batched_can_be(batched: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="batched must be True, False or 'auto'; got"):
        sf.CFG(2.0, batched=batched)
