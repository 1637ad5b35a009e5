"""Copies and pickles of samplers and of what they are made from; a sampler in many threads."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.sampling.program import Program

SHAPE = (2, 1, 8, 8)
LINEAR = sf.Schedule.linear()
LABELS = {"labels": torch.tensor([0, 2])}
CONFIG = UNetConfig(
    in_channels=1,
    base_channels=8,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    attention_factors=(2,),
    norm_groups=4,
    num_classes=3,
)


def unet() -> UNet:
    torch.manual_seed(0)
    model = UNet(CONFIG).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def plain(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return Bumpy()(x, t) + 0.1 * labels.view(-1, 1, 1, 1)


def log_probability(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return -((x - labels.view(-1, 1, 1, 1)) ** 2).flatten(1).sum(1)


def build(model: Any = None, **settings: Any) -> sf.Sampler:
    return sf.Sampler(unet() if model is None else model, LINEAR, **{"steps": 3, **settings})


def saved(value: Any) -> Any:
    """By torch.save, as a checkpoint would hold it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "oldest pickle": lambda value: pickle.loads(pickle.dumps(value, 0)),
    "torch.save": saved,
}
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

SAMPLERS: dict[str, dict[str, Any]] = {
    "a U-Net": {},
    "eager": {"graph": None},
    "a function": {"model": plain},
    "ddpm": {"method": "ddpm", "variance_type": "fixed_large", "clip_sample": None},
    "guided": {"guidance": sf.CFG(2.0, unconditional={"labels": None})},
    "guided at once": {"guidance": sf.CFG(2.0, {"labels": torch.tensor(3)}, batched=True)},
    "a classifier": {"guidance": sf.ClassifierGuidance(log_probability, 0.1)},
    "optimised": {"optimize": True},
}


@EACH_WAY
@pytest.mark.parametrize("settings", SAMPLERS.values(), ids=SAMPLERS)
def test_a_copy_samples_the_same_images(
    settings: dict[str, Any], way: Callable[[Any], Any]
) -> None:
    sampler = build(**settings)
    fresh = way(sampler)
    image = sampler.sample(SHAPE, seed=1, condition=LABELS)
    sampler.set_timesteps(4)
    used = way(sampler)
    for other in (fresh, used):
        assert other.stats()["programs"] == 0
        assert other.explain()
    assert torch.equal(fresh.sample(SHAPE, seed=1, condition=LABELS), image)
    expected = sampler.sample(SHAPE, seed=1, condition=LABELS)
    assert torch.equal(used.sample(SHAPE, seed=1, condition=LABELS), expected)
    counted = ("captures", "replays", "eager_steps", "programs", "bytes")
    assert [fresh.stats()[name] for name in counted][3:] == [1, sampler.stats()["bytes"]]


@EACH_WAY
def test_a_copy_may_be_made_while_the_sampler_is_busy(way: Callable[[Any], Any]) -> None:
    sampler = build(eta=0.5)
    steps = list(sampler.iterate(SHAPE, condition=LABELS))
    walk = sampler.iterate(SHAPE, condition=LABELS)
    next(walk)
    other = way(sampler)
    assert torch.equal(other.sample(SHAPE, condition=LABELS), steps[-1].x)
    assert torch.equal(list(walk)[-1].x, steps[-1].x)
    copies = []
    sampler.sample(SHAPE, condition=LABELS, callback=lambda _: copies.append(way(sampler)))
    assert torch.equal(copies[0].sample(SHAPE, condition=LABELS), steps[-1].x)


@EACH_WAY
def test_a_copy_is_on_its_own(way: Callable[[Any], Any]) -> None:
    sampler = build(max_programs=2)
    before = sampler.sample(SHAPE, condition=LABELS)
    other = way(sampler)
    other.set_timesteps(5, eta=1.0)
    other.sample(SHAPE, condition=LABELS)
    assert (len(sampler.timesteps), len(other.timesteps)) == (3, 5)
    assert (sampler.update.eta, other.update.eta) == (0.0, 1.0)
    assert torch.equal(sampler.sample(SHAPE, condition=LABELS), before)
    for size in (8, 10, 12):
        other.sample((1, 1, size, size))
    assert other.stats()["programs"] == 2, "settings are kept"
    shared = other.denoiser.model is sampler.denoiser.model
    assert shared == (way is copy.copy), "as for any object"


def test_a_deep_copy_keeps_what_is_shared_shared() -> None:
    model = unet()
    pair = copy.deepcopy({"model": model, "sampler": build(model)})
    assert pair["sampler"].denoiser.model is pair["model"]
    model.sampler = build(model)  # the part knows the whole
    twin = copy.deepcopy(model)
    assert twin.sampler.denoiser.model is twin
    image = model.sampler.sample(SHAPE, condition=LABELS)
    for other in (twin, pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.sampler.sample(SHAPE, condition=LABELS), image)


# --- what cannot be copied


class Locked(nn.Module):
    """A network that holds what no copy can have."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x


def released() -> nn.Module:
    inputs = (torch.zeros(SHAPE), torch.zeros(2, dtype=torch.int64), LABELS)
    return sf.optimize(unet(), inputs, weights="released")


@pytest.mark.parametrize("used", [False, True])
def test_a_lambda_can_be_copied_but_not_pickled(used: bool) -> None:
    sampler = build(lambda x, t: Bumpy()(x, t))
    image = build(lambda x, t: Bumpy()(x, t)).sample(SHAPE)
    if used:
        sampler.sample(SHAPE)
    for other in (copy.copy(sampler), copy.deepcopy(sampler)):
        assert torch.equal(other.sample(SHAPE), image)
    for dumps in (pickle.dumps, saved):
        with pytest.raises(TypeError, match=r"cannot pickle this Sampler: its model, .*<lambda>,"):
            dumps(sampler)


@pytest.mark.parametrize(
    ("settings", "ways", "message"),
    [
        ({"model": Locked}, ("deepcopy", "pickle"), "its model, a Locked, .* '_thread.lock'"),
        ({"model": released}, ("deepcopy", "pickle"), "its model, a Optimized, .* has freed"),
        (
            {"guidance": lambda: sf.ClassifierGuidance(lambda x, t: x, 1.0)},
            ("pickle",),
            "its guidance, a ClassifierGuidance, .*lambda",
        ),
    ],
)
def test_what_cannot_be_copied_is_named(
    settings: dict[str, Any], ways: tuple[str, ...], message: str
) -> None:
    sampler = build(**{name: make() for name, make in settings.items()})
    for way in ways:
        with pytest.raises(TypeError, match=f"this Sampler: {message}") as caught:
            WAYS[way](sampler)
        assert "\n" not in str(caught.value)


def test_an_iterator_cannot_be_copied_and_python_says_so() -> None:
    for way in ("copy", "deepcopy", "pickle"):
        with pytest.raises(TypeError, match="generator"):
            WAYS[way](build().iterate(SHAPE))


def test_pickling_does_not_write_the_weights_twice() -> None:
    """The trial leaves tensors out, so that it costs no memory."""
    model = nn.Linear(1, 1)
    weights = sum(w.nbytes for w in unet().parameters())
    size = len(pickle.dumps(build()))
    assert weights < size < weights + 200_000, model


# --- other objects


@EACH_WAY
@pytest.mark.parametrize(
    "make",
    [
        lambda: LINEAR,
        lambda: sf.CFG(2.0, unconditional={"labels": None}),
        lambda: sf.ClassifierGuidance(log_probability),
    ],
    ids=["Schedule", "CFG", "ClassifierGuidance"],
)
def test_settings_are_copied(make: Callable[[], Any], way: Callable[[Any], Any]) -> None:
    assert way(make()) == make()


@EACH_WAY
def test_steps_are_copied(way: Callable[[Any], Any]) -> None:
    step = next(build().iterate(SHAPE, condition=LABELS))
    other = way(step)
    assert (other.index, other.t) == (step.index, step.t)
    assert torch.equal(other.x, step.x)
    assert torch.equal(other.x0, step.x0)


@EACH_WAY
def test_checkpoints_are_copied(way: Callable[[Any], Any]) -> None:
    digits = sf.load("digits")
    other = way(digits)
    assert other.schedule == digits.schedule
    assert (other.labels, other.card) == (digits.labels, digits.card)
    x, t = torch.zeros(1, *digits.sample_shape), torch.tensor([500])
    assert torch.equal(other.model(x, t), digits.model(x, t))


@EACH_WAY
def test_optimised_models_are_copied(way: Callable[[Any], Any]) -> None:
    inputs = (torch.randn(SHAPE), torch.tensor([3, 700]))
    fast = sf.optimize(unet(), (*inputs, LABELS))
    expected = fast(*inputs, **LABELS)
    assert torch.equal(way(fast)(*inputs, **LABELS), expected)


@EACH_WAY
def test_accelerated_pipelines_are_copied(way: Callable[[Any], Any], tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    pipe = sf.accelerate(DDIMPipeline(net, DDIMScheduler()))
    pipe.set_progress_bar_config(disable=True)

    def image(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        made = pipe(1, generator=generator, num_inference_steps=2, output_type="np")
        return torch.from_numpy(made.images)

    expected = image(pipe)
    assert torch.equal(image(way(pipe)), expected)
    x, t = torch.ones(1, 3, 8, 8), int(pipe.scheduler.timesteps[0])
    stepped = pipe.scheduler.step(x, t, x).prev_sample
    assert torch.equal(way(pipe.scheduler).step(x, t, x).prev_sample, stepped)
    with torch.no_grad():
        assert torch.equal(way(pipe.unet)(x, t).sample, pipe.unet(x, t).sample)


# --- threads


def at_once(count: int, work: Callable[[int], None]) -> None:
    """``work(0)`` .. ``work(count - 1)``, each in a thread, started together."""
    gate, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        gate.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("settings", [SAMPLERS["a U-Net"], SAMPLERS["a function"]])
@pytest.mark.parametrize("graph", [None, "step"])
def test_a_fresh_sampler_in_eight_threads(settings: dict[str, Any], graph: str | None) -> None:
    alone = build(**settings, graph=graph)
    shapes = [(1 + i % 3, 1, 8, 8) for i in range(8)]
    conditions = [{"labels": torch.arange(shape[0]) % 3} for shape in shapes]
    expected = [alone.sample(s, seed=i, condition=conditions[i]) for i, s in enumerate(shapes)]
    for _ in range(3):
        sampler, images = build(**settings, graph=graph, max_programs=2), {}

        def work(i: int, sampler: sf.Sampler = sampler, images: dict[int, Tensor] = images) -> None:
            images[i] = sampler.sample(shapes[i], seed=i, condition=conditions[i])
            assert sampler.stats()["programs"] <= 3  # one may be on its way out
            assert sampler.explain()

        at_once(8, work)
        assert all(torch.equal(images[i], expected[i]) for i in range(8))


def test_counts_can_be_read_while_another_thread_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = build()
    for size in (8, 10):
        sampler.sample((1, 1, size, size))
    nbytes = Program.nbytes

    def slowly(program: Program) -> int:
        at_once(1, lambda _: sampler.sample((1, 1, 12, 12)))  # while the buffers are being counted
        return nbytes(program)

    monkeypatch.setattr(Program, "nbytes", slowly)
    assert sampler.stats()["programs"] == 2
    monkeypatch.undo()
    assert sampler.stats()["programs"] == 3


def test_copies_in_threads_of_their_own() -> None:
    sampler = build()
    expected = [build().sample(SHAPE, seed=i, condition=LABELS) for i in range(4)]
    images: dict[int, Tensor] = {}

    def work(i: int) -> None:
        images[i] = copy.copy(sampler).sample(SHAPE, seed=i, condition=LABELS)

    at_once(4, work)
    assert all(torch.equal(images[i], expected[i]) for i in range(4))
