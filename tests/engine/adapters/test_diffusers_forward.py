"""What the forward of any accelerated model does with its arguments, results and refusals."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.engine.adapters.diffusers_models import counted, noise
from tests.engine.adapters.zoo_parts import WIDTH, controlnet_model
from tests.engine.compile.networks import distance
from torch import Tensor

from stepfuse.engine.adapters.diffusers import accelerate, explain, restore
from stepfuse.engine.adapters.diffusers.arguments import Given, Parameters
from stepfuse.engine.adapters.diffusers.results import conversion

# float32 sums in another order: 1e-7 each, over a few hundred terms and some layers
REORDERED = 5e-6
X, TEXT, IMAGE = noise(2, 4, 8, 8), noise(2, 5, WIDTH, seed=1), noise(2, 3, 16, 16, seed=2)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def dit(kind: Any = None) -> Any:
    """A small transformer, of a class derived from DiT's where one is given."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    made = (kind or DiTTransformer2DModel)(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=100,
    )
    return made.eval()


LABELS = torch.tensor([3, 7])


@pytest.mark.parametrize(
    "t",
    [torch.tensor([17, 17]), torch.tensor([17]), torch.tensor([3, 80]), torch.tensor([2.5, 7.0])],
    ids=repr,
)
def test_timesteps_of_a_transformer(t: Tensor) -> None:
    plain = dit()
    expected = plain(X, t, LABELS).sample
    fast = accelerate(plain)
    found = fast(X, timestep=t, class_labels=LABELS).sample
    assert distance(found, expected) < REORDERED
    assert counted(fast, lambda: fast(X, t, LABELS)) == 0


def test_one_timestep_for_all_samples_is_a_row_of_the_table() -> None:
    fast = accelerate(dit())
    for value in (5, 9, 5):
        fast(X, torch.tensor(value).expand(2), LABELS)
    assert "2 announced" in explain(fast)
    fast(X, torch.tensor([1, 2]), LABELS)
    assert "2 announced" in explain(fast)


@pytest.mark.parametrize("first", [True, False])
def test_both_kinds_of_results_are_one_network(first: bool) -> None:
    plain = controlnet_model().eval()
    given = (X, torch.tensor(17), TEXT, IMAGE)
    fast = accelerate(copy.deepcopy(plain))
    for kind in (first, not first, first, not first):
        found, expected = (net(*given, return_dict=kind) for net in (fast, plain))
        assert type(found) is type(expected)
        assert len(found[0]) == len(expected[0]) == 4
        for a, b in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
            assert distance(a, b) < REORDERED
    assert explain(fast).count("inputs ") == 1
    assert counted(fast, lambda: fast(*given, return_dict=not first)) == 0


def test_results_that_are_more_than_another_name() -> None:
    """Kandinsky 5 returns the tensor itself without a dict: a network for either kind."""
    from diffusers import DiTTransformer2DModel

    class Bare(DiTTransformer2DModel):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, timestep: Any, return_dict: bool = True) -> Any:
            found = super().forward(hidden_states, timestep, LABELS)
            return found if return_dict else found.sample

    plain = dit(Bare)
    fast = accelerate(copy.deepcopy(plain))
    for kind in (True, False, True, False):
        found, expected = (net(X, LABELS, return_dict=kind) for net in (fast, plain))
        assert type(found) is type(expected)
        assert distance(found[0], expected[0]) < REORDERED
    assert explain(fast).count("inputs ") == 2


def test_which_results_can_be_converted() -> None:
    from diffusers.models.controlnets.controlnet import ControlNetOutput
    from diffusers.models.unets.unet_2d import UNet2DOutput

    a, b = noise(2, 3), noise(2, 3, seed=1)
    one = conversion((a,), UNet2DOutput(sample=a))
    assert one is not None
    assert torch.equal(one((b,)).sample, b)
    back = conversion(UNet2DOutput(sample=a), (a,))
    assert back is not None
    assert torch.equal(back(UNet2DOutput(sample=b))[0], b)
    assert conversion(UNet2DOutput(sample=a), a) is None
    assert conversion((a,), UNet2DOutput(sample=b)) is None  # other numbers
    assert conversion((a, b), UNet2DOutput(sample=a)) is None
    mixed = ControlNetOutput(down_block_res_samples=(b,), mid_block_res_sample=a)
    assert conversion(((a,), b), mixed) is None  # the other way around
    assert conversion(a, (a,)) is None


def test_a_number_for_a_factor_is_a_network_of_its_own() -> None:
    plain = controlnet_model().eval()
    fast = accelerate(copy.deepcopy(plain))
    for scale in (1.0, 0.25, 1.0):
        given = (X, 17, TEXT, IMAGE, scale)
        found, expected = (net(*given).mid_block_res_sample for net in (fast, plain))
        assert distance(found, expected) < REORDERED
    assert explain(fast).count("inputs ") == 2


def test_guess_mode() -> None:
    plain = controlnet_model().eval()
    fast = accelerate(copy.deepcopy(plain))
    for guess_mode in (True, False):
        found, expected = (
            net(X, 17, TEXT, IMAGE, guess_mode=guess_mode).down_block_res_samples
            for net in (fast, plain)
        )
        for a, b in zip(found, expected, strict=True):
            assert distance(a, b) < REORDERED


def reading() -> Any:
    """A transformer whose forward reads a value back."""
    from diffusers import DiTTransformer2DModel

    class Reading(DiTTransformer2DModel):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
            sign = -1 if float(hidden_states.mean()) > 0 else 1
            return super().forward(sign * hidden_states, timestep, LABELS)

    return dit(Reading)


def test_what_cannot_be_compiled_says_so_once() -> None:
    plain = reading()
    fast = accelerate(copy.deepcopy(plain))
    x = X - X.mean()
    with pytest.warns(
        UserWarning, match=r"was not compiled .*no graph: .*; what can be is"
    ) as said:
        found = fast(x - 0.1, LABELS).sample
    assert len([w for w in said if "stepfuse" in str(w.message)]) == 1
    assert distance(found, plain(x - 0.1, LABELS).sample) < REORDERED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distance(fast(x + 0.1, LABELS).sample, plain(x + 0.1, LABELS).sample) < REORDERED
    assert "no graph" in explain(fast)
    assert torch.equal(restore(fast)(x, LABELS).sample, plain(x, LABELS).sample)


def test_a_model_that_counts_its_calls_is_called_as_often_as_it_was() -> None:
    from diffusers import DiTTransformer2DModel

    class Counting(DiTTransformer2DModel):  # type: ignore[misc]
        calls = 0

        def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
            self.calls += 1
            return super().forward(hidden_states, timestep, LABELS, return_dict=return_dict)

    fast = accelerate(dit(Counting))
    with pytest.warns(UserWarning, match=r"forward changes .*calls"):
        fast(X, LABELS)
    for count, kind in enumerate((False, True, False), start=2):
        fast(X, LABELS, return_dict=kind)
        assert fast.calls == count


def caching(form: str) -> Any:
    """A transformer that keeps something in a container it is given."""
    from diffusers import DiTTransformer2DModel

    class Caching(DiTTransformer2DModel):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, timestep: Tensor, cache: Any) -> Any:
            if form == "list":
                cache[0] = hidden_states * 2 if cache[0] is None else cache[0] + hidden_states
                last = cache[0]
            elif form == "dict":
                cache["last"] = last = hidden_states
            elif form == "count":
                cache["calls"] += 1
                last = cache["calls"] * hidden_states
            else:
                last = cache.pop(0)
            return super().forward(last, timestep, LABELS)

    return dit(Caching)


@pytest.mark.parametrize(
    ("form", "cache"), [("list", [None]), ("dict", {}), ("count", {"calls": 0})]
)
def test_a_cache_among_the_arguments_is_written_to(form: str, cache: Any) -> None:
    """A graph would leave it as it was: the original runs, every time."""
    plain = caching(form)
    fast = accelerate(copy.deepcopy(plain))
    mine, theirs = copy.deepcopy(cache), copy.deepcopy(cache)
    with pytest.warns(UserWarning, match="writes to its argument cache, which a graph does not"):
        found = fast(X, LABELS, mine).sample
    assert torch.equal(found, plain(X, LABELS, theirs).sample)
    for _ in range(2):
        assert torch.equal(fast(X, LABELS, mine).sample, plain(X, LABELS, theirs).sample)
    leaves = [
        v if isinstance(v, Tensor) else torch.tensor(v)
        for v in (mine if isinstance(mine, list) else mine.values())
    ]
    others = [
        v if isinstance(v, Tensor) else torch.tensor(v)
        for v in (theirs if isinstance(theirs, list) else theirs.values())
    ]
    assert leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))
    assert "3 calls: forward writes to its argument cache" in explain(fast)


def test_what_is_taken_out_of_an_argument_is_no_cache() -> None:
    plain = caching("taken")
    fast = accelerate(copy.deepcopy(plain))
    found = fast(X, LABELS, [X, X]).sample
    assert distance(found, plain(X, LABELS, [X, X]).sample) < REORDERED
    assert counted(fast, lambda: fast(X, LABELS, [X, X])) == 0


def test_arguments_of_other_kinds_run_the_original() -> None:
    plain = caching("taken")
    fast = accelerate(copy.deepcopy(plain))

    class Queue(list):  # type: ignore[type-arg]
        pass

    with pytest.warns(UserWarning, match="argument cache holds a Queue"):
        found = fast(X, LABELS, Queue([X])).sample
    assert torch.equal(found, plain(X, LABELS, Queue([X])).sample)


def test_copies_and_pickles_of_a_transformer() -> None:
    fast = accelerate(dit())
    before = fast(X, LABELS, LABELS).sample
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(X, LABELS, LABELS).sample, before)
        other.proj_out_2.weight.mul_(2)
        assert distance(other(X, LABELS, LABELS).sample, before) > 1e-3
        assert torch.equal(fast(X, LABELS, LABELS).sample, before)
        assert "forward" not in vars(restore(other))
        assert "forward" in vars(fast)


def test_which_argument_is_which() -> None:
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    flux, unet = (
        Parameters(kind.forward) for kind in (FluxTransformer2DModel, UNet2DConditionModel)
    )
    assert (flux.x, flux.time, flux.per_sample) == ("hidden_states", "timestep", False)
    assert (unet.x, unet.time, unet.per_sample) == ("sample", "timestep", True)
    given = unet.given((X, 3, TEXT), {"return_dict": False, "attention_mask": None})
    assert isinstance(given, Given)
    assert given.condition == {"encoder_hidden_states": TEXT}
    assert given.return_dict is False
    given = unet.given((X, 3), {"encoder_hidden_states": None})
    assert isinstance(given, Given)
    assert given.condition == {"encoder_hidden_states": None}  # it has no default
    for wrong in ({"nothing": 1}, {"sample": X}):
        assert unet.given((X, 3), wrong) == "arguments that do not fit"
    assert unet.given((X,), {}) == "arguments that do not fit"
    assert unet.given(("x", 3), {}) == "sample is not a tensor [N, ...]"
    assert unet.given((X, [3]), {}) == "timestep is a list"
    assert unet.given((X, 3), {"return_dict": 1}) == "return_dict is a int"
