"""A bare U-Net: what compiled networks take, what the original runs, what does not change."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.engine.adapters.diffusers_models import counted, least_unet2d, noise
from tests.engine.compile.networks import distance
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.bench.stable_diffusion import conditional_unet
from stepfuse.engine.adapters.diffusers import accelerate, explain, restore

# float32 sums in another order: 1e-7 each, over a few hundred terms and some layers
REORDERED = 5e-6
X, TEXT = noise(2, 4, 8, 8), noise(2, 5, 8, seed=1)
T = torch.tensor(17)
STEPS = [
    T,
    17,
    torch.tensor([17]),
    torch.tensor([17, 17]),
    torch.tensor([3, 801]),
    torch.tensor(17, dtype=torch.int32),
    torch.tensor(17.25),
    torch.tensor([3.5, 801.0]),
]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def shared() -> tuple[Any, Any]:
    """A U-Net with cross-attention, and its copy accelerated; for tests that change neither."""
    torch.manual_seed(0)
    plain = conditional_unet()
    return plain, accelerate(copy.deepcopy(plain))


@pytest.mark.parametrize("t", STEPS, ids=repr)
def test_timesteps_of_every_kind(t: Any, shared: tuple[Any, Any]) -> None:
    plain, fast = shared
    fast(X, t, TEXT)
    assert counted(fast, lambda: fast(X, t, TEXT)) == 0
    assert distance(fast(X, t, TEXT).sample, plain(X, t, TEXT).sample) < REORDERED


@pytest.mark.parametrize("t", [*STEPS[:2], 17.75], ids=repr)
def test_a_network_without_cross_attention(t: Any) -> None:
    plain = least_unet2d(num_class_embeds=5)
    x, labels = noise(3, 3, 8, 8), torch.tensor([0, 4, 2])
    expected = plain(x, t, labels).sample
    found = accelerate(plain)(x, t, class_labels=labels)
    assert type(found).__name__ == "UNet2DOutput"
    assert distance(found.sample, expected) < REORDERED


def test_both_kinds_of_result(shared: tuple[Any, Any]) -> None:
    plain, fast = shared
    found = fast(sample=X, timestep=T, encoder_hidden_states=TEXT, return_dict=True)
    assert type(found) is type(plain(X, T, TEXT))
    (single,) = fast(X, T, TEXT, return_dict=False)
    assert torch.equal(found.sample, single)


def test_results_are_the_callers_own(shared: tuple[Any, Any]) -> None:
    first = shared[1](X, T, TEXT).sample
    kept = first.clone()
    shared[1](-X, T, TEXT)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "options",
    [
        {
            "mid_block_additional_residual": noise(2, 16, 4, 4),
            "down_block_additional_residuals": tuple(
                noise(2, c, n, n) for c, n in [(8, 8), (8, 8), (8, 4), (16, 4)]
            ),
        },
        {"down_intrablock_additional_residuals": [noise(2, 8, 8, 8), noise(2, 16, 4, 4)]},
        {"encoder_attention_mask": torch.tensor([[True, True, False, False, False]] * 2)},
        {"encoder_attention_mask": torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]] * 2)},
    ],
    ids=lambda options: "-".join(options),
)
def test_arguments_beside_the_usual(options: dict[str, Any], shared: tuple[Any, Any]) -> None:
    """Residuals of a ControlNet and of a T2I adapter, masks."""

    def given() -> dict[str, Any]:  # diffusers empties the list
        return {k: [*v] if isinstance(v, list) else v for k, v in options.items()}

    plain, fast = shared
    expected = plain(X, T, TEXT, **given()).sample
    assert distance(fast(X, T, TEXT, **given()).sample, expected) < REORDERED
    assert counted(fast, lambda: fast(X, T, TEXT, **given())) == 0
    assert distance(fast(X, T, TEXT).sample, expected) > 1e-4


def test_a_scale_of_adapters_runs_the_original(shared: tuple[Any, Any]) -> None:
    plain, fast = copy.deepcopy(shared)
    options = {"cross_attention_kwargs": {"scale": 0.5}}
    with pytest.warns(UserWarning, match=r"argument cross_attention_kwargs.*; set_adapters takes"):
        found = fast(X, T, TEXT, **options).sample
    assert torch.equal(found, plain(X, T, TEXT, **options).sample)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(X, T, TEXT, **options)  # said once
    assert "2 calls: argument cross_attention_kwargs" in explain(fast)


def test_errors_are_the_originals(shared: tuple[Any, Any]) -> None:
    for arguments in (
        (X,),
        (X, T),
        (X, T, noise(2, 5, 9)),
        (X, None, TEXT),
        (X, T[None, None], TEXT),
    ):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            shared[0](*arguments)
        with pytest.raises(expected.type) as found:
            shared[1](*arguments)
        assert str(found.value) == str(expected.value)


def test_gradients_come_from_the_original(shared: tuple[Any, Any]) -> None:
    plain, fast = copy.deepcopy(shared)
    with torch.enable_grad():
        for unet in (plain, fast):
            unet(X, T, TEXT).sample.square().mean().backward()
    for (name, found), expected in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), name
        assert found.grad is None or torch.equal(found.grad, expected.grad), name
    fast.requires_grad_(False)
    with torch.enable_grad():
        assert counted(fast, lambda: fast(X, T, TEXT)) == 1  # it compiles: nothing wants a gradient
        x = X.clone().requires_grad_()
        assert fast(x, T, TEXT).sample.requires_grad


def test_transforms_run_the_original(shared: tuple[Any, Any]) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    plain, fast = copy.deepcopy(shared)
    for unet in (plain, fast):  # the fused attention of the CPU has no forward derivative
        unet.set_attn_processor(AttnProcessor())

    def slope(unet: Any) -> Any:
        return torch.func.jvp(lambda x: unet(x, T, TEXT).sample, (X,), (torch.ones_like(X),))[1]

    assert torch.equal(slope(fast), slope(plain))


def test_compiled_by_torch(shared: tuple[Any, Any]) -> None:
    """torch.compile is given the network, not what stands before it."""
    plain, fast = copy.deepcopy(shared)  # torch.compile marks what it is given
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X, T, TEXT).sample, plain(X, T, TEXT).sample)


def test_another_default_device(shared: tuple[Any, Any]) -> None:
    plain, fast = shared
    expected = plain(X, T, TEXT).sample
    for t in (T, 17):
        with torch.device("meta"):
            found = fast(X, t, TEXT).sample
        assert distance(found, expected) < REORDERED


def test_autocast_runs_the_original(shared: tuple[Any, Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (unet(X, T, TEXT).sample for unet in reversed(shared))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_nothing_but_the_forward_changes(shared: tuple[Any, Any]) -> None:
    plain, fast = shared
    assert type(fast) is type(plain)
    assert fast.config == plain.config
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert len(list(fast.modules())) == len(list(plain.modules()))
    assert vars(fast).keys() - vars(plain).keys() == {"forward"}


def test_copies_and_pickles_are_their_own() -> None:
    unet = accelerate(conditional_unet(channels=(8,)))
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        before = unet(X, T, TEXT).sample
        assert torch.equal(other(X, T, TEXT).sample, before)
        for weight in other.parameters():
            weight.mul_(1.1)
        assert distance(other(X, T, TEXT).sample, before) > 1e-3
        assert torch.equal(unet(X, T, TEXT).sample, before)
        restore(other)
        assert "forward" not in vars(other)
        assert "forward" in vars(unet)


def test_the_sampler_takes_it(shared: tuple[Any, Any]) -> None:
    found, expected = (
        sf.Sampler(unet, sf.Schedule.linear(), steps=3).sample(
            X.shape, seed=0, condition={"encoder_hidden_states": TEXT}
        )
        for unet in reversed(shared)
    )
    assert distance(found, expected) < 1e-4


def test_options_and_errors() -> None:
    unet = least_unet2d()
    assert restore(unet) is unet
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch.int8"):
        accelerate(unet, dtype=torch.int8)
    with pytest.raises(ValueError, match="nothing to accelerate"):
        accelerate(unet, optimize=False)
    with pytest.raises(TypeError, match="optimize must be True or False; got str 'yes'"):
        accelerate(unet, optimize="yes")
    with pytest.raises(TypeError, match=r"Linear; supported: models of diffusers .*pipelines of"):
        accelerate(nn.Linear(2, 2))
    assert "forward" not in vars(unet)
    forward = vars(accelerate(accelerate(unet)))["forward"]
    assert vars(accelerate(unet, dtype=torch.float32))["forward"] is forward
    assert vars(accelerate(unet, dtype=torch.bfloat16))["forward"].dtype is torch.bfloat16
    assert "forward" not in vars(restore(unet))


def test_classes_of_the_users_own() -> None:
    from diffusers import UNet2DModel

    class Other(UNet2DModel):  # type: ignore[misc]
        def forward(self, sample: Tensor, timestep: Any, strength: float = 1.0) -> Tensor:
            return strength * super().forward(sample, timestep).sample

    class Same(UNet2DModel):  # type: ignore[misc]
        pass

    torch.manual_seed(0)
    options, x = {**least_unet2d().config}, noise(1, 3, 8, 8)
    found = accelerate(Same.from_config(options).eval())
    found(x, T)
    assert counted(found, lambda: found(x, T)) == 0
    other = Other.from_config(options).eval()
    expected = other(x, T, strength=0.5)
    accelerate(other)
    assert distance(other(x, T, strength=0.5), expected) < REORDERED
    assert counted(other, lambda: other(x, T, strength=0.5)) == 0
