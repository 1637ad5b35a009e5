"""`optimize` as its users see it: U-Nets of several libraries, weights, shapes, copies, capture."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import Small, conditioned, distance, own, small
from torch import Tensor, nn

from stepfuse import CFG, Sampler, Schedule
from stepfuse.engine.compile.optimize import Optimized, WeightsChanged, optimize
from stepfuse.engine.replay.capture import Recording

# float32 sums in another order, through some twenty layers
REORDERED = 1e-5


def diffusers_unet(**options: Any) -> Any:
    from diffusers import UNet2DModel

    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**defaults, **options}).eval()


@pytest.mark.parametrize("options", [{}, {"resnet_time_scale_shift": "scale_shift"}])
@torch.no_grad()
def test_a_diffusers_unet(options: dict[str, Any]) -> None:
    unet = diffusers_unet(**options)
    x, t = torch.randn(2, 3, 10, 6), torch.tensor([7, 7])
    fast = optimize(unet, (x, t))
    assert distance(fast(x, t).sample, unet(x, t).sample) < REORDERED
    assert type(fast(x, t)) is type(unet(x, t))
    (tuple_output,) = fast(x, t, return_dict=False)
    assert distance(tuple_output, unet(x, t).sample) < REORDERED
    low = optimize(unet, (x, t), dtype=torch.bfloat16)(x, t).sample
    with torch.autocast("cpu", torch.bfloat16):
        eager = unet(x, t).sample
    expected = unet(x, t).sample
    assert distance(low, expected) < 1.1 * distance(eager, expected)
    assert "0 left" not in fast.explain()


@torch.no_grad()
def test_a_conditioned_diffusers_unet() -> None:
    unet = conditioned()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 5, 12)
    condition = {"encoder_hidden_states": text}
    fast = optimize(unet, (x, t, condition))
    expected = unet(x, t, **condition).sample
    assert distance(fast(x, t, **condition).sample, expected) < REORDERED
    low = optimize(unet, (x, t, condition), dtype=torch.bfloat16)(x, t, **condition).sample
    assert distance(low, expected) < 2e-2


@pytest.mark.parametrize(
    "options",
    [
        {"scale_shift": True, "updown": "resblock", "learned_variance": True, "head_channels": 16},
        {"asymmetric_downsample": True, "residual_rescale": True},
    ],
)
@torch.no_grad()
def test_our_own_unet(options: dict[str, Any]) -> None:
    unet, inputs = own(**options)
    assert distance(optimize(unet, inputs)(*inputs), unet(*inputs)) < REORDERED


@torch.no_grad()
def test_every_shape_has_its_network_and_few_are_kept() -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t), max_networks=2)
    for shape in [(1, 3, 4, 6), (3, 3, 7, 9), (2, 3, 5, 5)]:
        x, t = torch.randn(shape), torch.arange(shape[0])
        assert distance(fast(x, t), model(x, t)) < REORDERED
    assert fast.explain().count("inputs ") == 2


@torch.no_grad()
def test_announced_timesteps_come_from_the_table_and_others_still_work() -> None:
    model, (x, _) = small()
    fast = optimize(model, (x, torch.zeros(3, dtype=torch.int64)), timesteps=[10, 4])
    fast.prepare([999, 10])
    (network,) = fast.networks
    assert set(network.table.filled) == {10, 4, 999}
    for t in ([10, 10, 10], [4, 999, 10], [4, 5, 6], [0, 0, 0]):
        assert distance(fast(x, torch.tensor(t)), model(x, torch.tensor(t))) < REORDERED
    with pytest.raises(ValueError, match="5000"):
        fast.prepare([5000])


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_changed_weights_are_noticed_and_read_again(
    through_data: bool, dtype: torch.dtype | None
) -> None:
    model, inputs = small()
    fast = optimize(model, inputs, dtype=dtype, timesteps=[5, 0, 999])
    before = fast(*inputs)
    for p in model.parameters():
        (p.data if through_data else p).mul_(1.5)
    with pytest.raises(WeightsChanged, match=r"refresh\(\)"):
        fast(*inputs)
    fast.refresh()
    tolerance = REORDERED if dtype is None else 2e-2
    assert distance(fast(*inputs), model(*inputs)) < tolerance
    assert distance(fast(*inputs), before) > 0.1


@torch.no_grad()
def test_a_replaced_weight_is_noticed_and_the_old_one_is_not_written() -> None:
    model, inputs = small()
    assert isinstance(model, Small)
    fast = optimize(model, inputs)
    old = model.a.conv1.weight
    kept = old.clone()
    model.a.conv1.weight = nn.Parameter(torch.randn_like(old))
    with pytest.raises(WeightsChanged, match=r"a\.conv1\.weight"):
        fast(*inputs)
    fast.refresh()
    assert distance(fast(*inputs), model(*inputs)) < REORDERED
    assert torch.equal(old, kept)


@torch.no_grad()
def test_the_original_stays_as_it_was() -> None:
    model, inputs = small()
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fast = optimize(model, inputs, dtype=torch.bfloat16)
    fast(*inputs)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    twin = pickle.loads(pickle.dumps(model)).eval()
    assert torch.equal(twin(*inputs), copy.deepcopy(model).eval()(*inputs))


@torch.no_grad()
def test_copies_and_pickles_compile_again() -> None:
    model, inputs = small()
    fast = optimize(model, inputs, timesteps=[5])
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(*inputs), fast(*inputs))
        assert twin.original is not model


def test_gradients_come_from_the_original() -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for function, leaf in zip((fast, model), inputs, strict=True):
        function(leaf, t).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


class Branch(nn.Module):
    """Cannot be exported: it branches on the mean of x."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1))
        self.norm = nn.GroupNorm(1, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.body(x) if x.mean() > 0 else x
        out: Tensor = self.norm(x)
        return out


@torch.no_grad()
def test_what_cannot_be_exported_has_its_norms_exchanged() -> None:
    model, x, t = Branch().eval(), torch.rand(2, 4, 5, 3), torch.tensor([1, 2])
    fast = optimize(model, (x, t))
    assert "module replacement     2 of 2; no graph: " in fast.explain()
    for image in (x, -x):
        assert distance(fast(image, t), model(image, t)) < REORDERED
    assert type(model.body[0]) is nn.GroupNorm
    low = optimize(model, (x, t), dtype=torch.bfloat16)(x, t)
    assert low.dtype is torch.float32
    assert distance(low, model(x, t)) < 1e-2
    model.norm = nn.GroupNorm(4, 4)
    fast.refresh()
    assert distance(fast(x, t), model(x, t)) < REORDERED


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_a_captured_sampler_replays_it(announced: bool, guided: bool) -> None:
    unet, inputs = own(num_classes=3)
    fast = optimize(unet, inputs, timesteps=range(0, 1000, 200) if announced else ())
    images = []
    for model in (unet, fast):
        guidance = CFG(2.0, unconditional={"labels": None}) if guided else None
        sampler = Sampler(model, Schedule.linear(), steps=5, guidance=guidance)
        condition = {"labels": torch.tensor([0, 1])}
        images.append(sampler.sample((2, 3, 10, 6), seed=1, condition=condition))
        assert sampler.stats()["replays"] == 5, sampler.explain()
    assert distance(images[1], images[0]) < 1e-4


@torch.no_grad()
def test_a_recorded_step_knows_the_announced_timesteps() -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t), timesteps=[1, 2])
    with pytest.raises(IndexError, match=r"2 announced ones.*prepare\(timesteps\)"):
        Recording(lambda: x.copy_(fast(x, t)))
    fast.prepare(t.tolist())
    out = torch.empty_like(x)
    step = Recording(lambda: out.copy_(fast(x, t)))
    for timesteps in ([1, 1, 2], [999, 0, 5]):
        t.copy_(torch.tensor(timesteps))
        step.replay()
        assert distance(out, model(x, t)) < REORDERED


def test_a_captured_step_follows_refreshed_weights() -> None:
    unet, inputs = own()
    fast = optimize(unet, inputs, timesteps=range(0, 1000, 200))
    sampler = Sampler(fast, Schedule.linear(), steps=5)
    sampler.sample((2, 3, 10, 6), seed=1)
    with torch.no_grad():
        for p in unet.parameters():
            p.mul_(0.9)
    fast.refresh()
    replayed = sampler.sample((2, 3, 10, 6), seed=1)
    assert sampler.stats()["captures"] == 1
    expected = Sampler(unet, Schedule.linear(), steps=5).sample((2, 3, 10, 6), seed=1)
    assert distance(replayed, expected) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": lambda x, t: x}, TypeError, "nn.Module"),
        ({"dtype": torch.int8}, ValueError, "torch.int8"),
        ({"without": ["channel_last"]}, ValueError, "channels_last"),
        ({"max_networks": 0}, ValueError, "got 0"),
        ({"example_inputs": ()}, TypeError, "start with the tensor x"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, inputs = small()
    with pytest.raises(error, match=message):
        optimize(**{"model": model, "example_inputs": inputs, **arguments})


def test_the_number_of_threads_is_the_callers() -> None:
    model, inputs = small()
    torch.set_num_threads(1)
    fast = optimize(model, inputs, dtype=torch.bfloat16)
    fast(*inputs)
    assert torch.get_num_threads() == 1
    assert isinstance(fast, Optimized)
