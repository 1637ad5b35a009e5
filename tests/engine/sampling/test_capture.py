"""A replayed step is the eager step, bit for bit; what cannot be captured is refused by name."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.replay.capture import (
    CaptureRefused,
    Reading,
    Recording,
    as_repeatable,
    check_replay,
)

SHAPE = (3, 1, 8, 8)
SCHEDULE = sf.Schedule.linear()
LABELS = {"labels": torch.tensor([0, 1, 2])}
CFG = sf.CFG(3.0, unconditional={"labels": None})


def small_unet(learned_variance: bool = False) -> UNet:
    """A conditional U-Net of two levels with every kind of block, weights not at their zeros."""
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=1,
        base_channels=8,
        channel_multipliers=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        norm_groups=4,
        scale_shift=True,
        num_classes=3,
        learned_variance=learned_variance,
    )
    model = UNet(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def unet() -> UNet:
    return small_unet()


def both(model: nn.Module, **settings: object) -> tuple[sf.Sampler, sf.Sampler]:
    """The same sampler, eager and captured."""
    eager = sf.Sampler(model, SCHEDULE, graph=None, **settings)
    return eager, sf.Sampler(model, SCHEDULE, graph="step", **settings)


def assert_same_images(eager: sf.Sampler, captured: sf.Sampler, **call: object) -> Tensor:
    expected, got = eager.sample(SHAPE, **call), captured.sample(SHAPE, **call)
    assert captured.stats()["eager_steps"] == 0, captured.explain()
    assert captured.stats()["replays"] > 0
    assert torch.equal(got, expected)
    assert bool(got.isfinite().all())
    return got


@pytest.mark.parametrize("guidance", [None, CFG, sf.CFG(3.0, {"labels": None}, rescale=0.7)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "mean"])
@pytest.mark.parametrize(
    ("method", "eta"),
    [("ddim", 0.0), ("ddim", 0.6), ("ddim", 1.0), ("ddim_hat", 0.0), ("ddpm", 0.0)],
)
def test_replay_equals_eager(
    unet: UNet, method: str, eta: float, prediction_type: str, guidance: sf.CFG | None
) -> None:
    eager, captured = both(
        unet, method=method, eta=eta, prediction_type=prediction_type, guidance=guidance, steps=4
    )
    assert_same_images(eager, captured, condition=LABELS, seed=1)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range", "fixed_large"])
def test_replay_equals_eager_for_every_variance(variance_type: str) -> None:
    model = small_unet(learned_variance=variance_type != "fixed_large")
    eager, captured = both(model, method="ddpm", variance_type=variance_type, steps=4)
    assert_same_images(eager, captured, condition=LABELS, seed=2)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_replay_equals_eager_for_any_number_of_steps(steps: int) -> None:
    model = nn.Conv2d(1, 1, 3, padding=1)
    eager, captured = both(Timed(model), eta=0.5, steps=steps)
    assert_same_images(eager, captured, seed=3)


class Timed(nn.Module):
    """An image model that depends on the timestep."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x) * torch.cos(t.to(x.dtype) / 300).view(-1, 1, 1, 1)


def test_one_capture_serves_every_seed_condition_start_and_noise(unet: UNet) -> None:
    eager, captured = both(unet, eta=0.3, steps=3)
    torch.manual_seed(5)
    for seed in (0, 2**63 + 1, torch.tensor([4, 4, 9])):
        for labels in ([0, 0, 0], [2, 1, 0]):
            call = {"seed": seed, "condition": {"labels": torch.tensor(labels)}}
            assert_same_images(eager, captured, **call)
            assert_same_images(eager, captured, x_T=torch.randn(SHAPE), **call)
    assert captured.stats()["captures"] == 1


def test_one_capture_serves_every_table(unet: UNet) -> None:
    captured = sf.Sampler(unet, SCHEDULE, graph="step", steps=6, eta=0.0)
    captured.sample(SHAPE, condition=LABELS)
    for steps, eta in ((4, 1.0), (9, 0.2), (6, 0.0)):
        captured.set_timesteps(steps=steps, eta=eta)
        expected = sf.Sampler(unet, SCHEDULE, graph=None, steps=steps, eta=eta)
        got = captured.sample(SHAPE, condition=LABELS)
        assert torch.equal(got, expected.sample(SHAPE, condition=LABELS))
    assert captured.stats()["captures"] == 1


def test_encoding_and_decoding_are_replayed_too(unet: UNet) -> None:
    eager, captured = both(unet, steps=5)
    image = torch.rand(SHAPE) * 2 - 1
    for convention in ("current", "target"):
        z = captured.encode(image, LABELS, convention=convention)
        assert torch.equal(z, eager.encode(image, LABELS, convention=convention))
        assert torch.equal(captured.decode(z, LABELS), eager.decode(z, LABELS))
    assert captured.stats()["captures"] == 1


def test_masks_and_given_noise_are_replayed(unet: UNet) -> None:
    eager, captured = both(unet, steps=4, eta=1.0)
    mask = (torch.rand(1, 1, 8, 8) > 0.5).float()
    image = torch.rand(SHAPE) * 2 - 1
    got = assert_same_images(eager, captured, image=image, mask=mask, condition=LABELS)
    assert torch.equal(torch.where(mask > 0, image, got), image)
    assert_same_images(eager, captured, noise=torch.randn(4, *SHAPE), condition=LABELS)


def test_classifier_guidance_is_captured_with_its_gradient(unet: UNet) -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def log_probability(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return classifier(x).log_softmax(1).gather(1, labels[:, None])[:, 0]

    for method in ("ddim", "ddpm"):
        guidance = sf.ClassifierGuidance(log_probability, 2.0)
        eager, captured = both(unet, method=method, steps=4, guidance=guidance)
        guided = assert_same_images(eager, captured, condition=LABELS)
        plain = sf.Sampler(unet, SCHEDULE, method=method, steps=4).sample(SHAPE, condition=LABELS)
        assert not torch.equal(guided, plain)


def test_weights_updated_in_place_take_effect(unet: UNet) -> None:
    model = small_unet()
    eager, captured = both(model, steps=3)
    before = assert_same_images(eager, captured, condition=LABELS)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    assert not torch.equal(assert_same_images(eager, captured, condition=LABELS), before)
    assert captured.stats()["captures"] == 1


@pytest.mark.parametrize("replace", ["parameter", "data"])
def test_replaced_weights_take_effect(replace: str) -> None:
    model = small_unet()
    eager, captured = both(model, steps=3)
    before = captured.sample(SHAPE, condition=LABELS)
    name, weight = next(iter(model.named_parameters()))
    fresh = nn.Parameter(weight.detach() * 1.5)
    if replace == "data":
        weight.data = fresh.data
    else:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, fresh)
    assert not torch.equal(assert_same_images(eager, captured, condition=LABELS), before)
    assert captured.stats()["captures"] == 2, "the step was captured anew"


def test_outputs_survive_the_next_replay(unet: UNet) -> None:
    captured = sf.Sampler(unet, SCHEDULE, graph="step", steps=3)
    first = captured.sample(SHAPE, seed=0, condition=LABELS)
    kept = first.clone()
    states = [step.x for step in captured.iterate(SHAPE, seed=1, condition=LABELS)]
    kept_states = [x.clone() for x in states]
    captured.sample(SHAPE, seed=2, condition=LABELS)
    assert torch.equal(first, kept)
    assert all(torch.equal(a, b) for a, b in zip(states, kept_states, strict=True))
    assert not torch.equal(states[0], states[1])


class Broken(nn.Module):
    """Models a graph cannot hold, each for its own reason."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.how == "item":
            return x * (t[0].item() / 1000)
        if self.how == "branch":
            return x if t[0] > 500 else -x
        if self.how == "shape":
            return x + x[x > 0].sum()
        if self.how == "numpy":
            return x * float(t.numpy()[0] / 1000)
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("item", r"_local_scalar_dense.*t\[0\]\.item\(\)"),
        ("branch", r"t\[0\] > 500"),
        ("shape", r"x\[x > 0\]"),
        ("numpy", "copies a tensor to the host"),
        ("counter", "decided in Python"),
    ],
)
def test_what_cannot_be_captured_is_refused_and_runs_eagerly(how: str, reason: str) -> None:
    import re

    sampler = sf.Sampler(Broken(how), SCHEDULE, graph="step", steps=4, clip_sample=None)
    got = sampler.sample(SHAPE)
    assert re.search(reason, sampler.explain()), sampler.explain()
    assert sampler.stats()["captures"] == 0
    assert sampler.stats()["eager_steps"] == 4
    if how != "counter":
        expected = sf.Sampler(Broken(how), SCHEDULE, graph=None, steps=4, clip_sample=None)
        assert torch.equal(got, expected.sample(SHAPE))


def test_a_recording_keeps_buffers_by_reference_and_frees_what_it_makes() -> None:
    x, weight = torch.ones(4), torch.full((4,), 2.0)

    def step() -> None:
        a, b = (x * weight).view(2, 2).chunk(2)
        x.copy_(torch.cat([b, a]).flatten() + 1)

    recording = Recording(step)
    assert torch.equal(x, torch.full((4,), 3.0))
    weight.fill_(3.0)
    recording.replay()
    assert torch.equal(x, torch.full((4,), 10.0))
    assert recording.operations == 7


def test_a_capture_knows_where_the_tensors_lie_that_it_was_given() -> None:
    x, weight, other = torch.ones(4), torch.full((2, 4), 2.0), torch.ones(4)

    def step() -> None:
        made = x * 3
        made.add_(1)
        x.copy_((weight.t() @ torch.ones(2)) + made)

    recording = Recording(step)
    with Reading() as reading:
        step()
    assert recording.holds()
    assert reading.read.holds()
    assert {id(t) for t in reading.read.tensors} == {id(x), id(weight)}
    other.data = torch.ones(4)
    x.add_(1)
    assert recording.holds()
    assert reading.read.holds()
    weight.data = torch.full((2, 4), 3.0)
    assert not recording.holds()
    assert not reading.read.holds()


def test_a_replay_may_round_as_the_eager_step_does_from_run_to_run() -> None:
    x = [torch.randn(100), torch.randn(3, 5)]

    def off(by: float) -> list[Tensor]:
        return [v + by * torch.randn_like(v) for v in x]

    assert as_repeatable(x, off(1e-6), off(1e-6))
    assert not as_repeatable(x, off(1e-6), off(1e-4)), "much more than from run to run"
    assert not as_repeatable(x, x, off(1e-6)), "the eager step is the same every time"
    assert not as_repeatable(x, off(0.3), off(0.3)), "something is drawn anew in every step"


def test_check_replay_sees_a_wrong_recording() -> None:
    x, count = torch.ones(3), [1.0]

    def step() -> None:
        x.mul_(count[0])
        count[0] += 1

    recording = Recording(step)
    with pytest.raises(CaptureRefused, match="differs from the eager step"):
        check_replay(recording, step, (x,), (x,))
    assert torch.equal(x, torch.ones(3)), "state is put back"


def test_comparing_a_replay_draws_from_no_other_devices_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.zeros(3)
    recording = Recording(lambda: x.copy_(torch.rand(3)))
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    check_replay(recording, lambda: x.copy_(torch.rand(3)), (x,), (x,))
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_two_samplers_in_two_threads_and_one_in_both(unet: UNet) -> None:
    samplers = [sf.Sampler(unet, SCHEDULE, steps=5, graph="step") for _ in range(2)]
    expected = [samplers[0].sample(SHAPE, seed=s, condition=LABELS) for s in range(4)]
    results: dict[tuple[int, int], Tensor] = {}

    def work(number: int, shared: bool) -> None:
        sampler = samplers[0 if shared else number]
        for seed in range(4):
            results[number, seed] = sampler.sample(SHAPE, seed=seed, condition=LABELS)

    for shared in (False, True):
        results.clear()
        threads = [threading.Thread(target=work, args=(i, shared)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 8
        assert all(torch.equal(image, expected[seed]) for (_, seed), image in results.items())


def test_interrupting_leaves_the_sampler_usable(unet: UNet) -> None:
    sampler = sf.Sampler(unet, SCHEDULE, steps=5, graph="step")
    expected = sampler.sample(SHAPE, condition=LABELS)

    def interrupt(step: sf.Step) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(SHAPE, condition=LABELS, callback=interrupt)
    assert torch.equal(sampler.sample(SHAPE, condition=LABELS), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA")
@pytest.mark.parametrize("graph", ["step", "loop"])
def test_cuda_graph_equals_eager(graph: str) -> None:
    model = small_unet().cuda()
    labels = {"labels": LABELS["labels"].cuda()}
    eager = sf.Sampler(model, SCHEDULE, steps=4, eta=0.5, graph=None)
    captured = sf.Sampler(model, SCHEDULE, steps=4, eta=0.5, graph=graph)
    expected = eager.sample(SHAPE, condition=labels)
    assert torch.equal(captured.sample(SHAPE, condition=labels), expected)
    assert captured.stats()["eager_steps"] == 0


def test_a_checkpoint_is_sampled_without_pytorchs_compiler() -> None:
    """Which takes seconds and 140 MB to import, and is there for whoever compiles."""
    code = (
        "import sys, torch, stepfuse as sf\n"
        "digits = sf.load('digits')\n"
        "sampler = sf.Sampler(digits.model, digits.schedule, steps=2)\n"
        "sampler.sample((1, *digits.sample_shape), condition={'labels': torch.tensor([1])})\n"
        "assert sampler.stats()['replays'], sampler.explain()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
