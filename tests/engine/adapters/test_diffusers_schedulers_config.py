"""Configurations, attributes, pipelines and mistakes: ours stand in for diffusers' schedulers."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from tests.engine.adapters.schedulers_case import ODD, OURS, assert_same, close, pair, run

from stepfuse.engine.adapters.diffusers.listed import place_in

NAMES = list(OURS)
CONFIGS: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    {"trained_betas": np.array([0.1, 0.3]), "num_train_timesteps": 2},
]
PUBLIC = ["scale_model_input", "set_timesteps", "step", "add_noise", "get_velocity"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_attributes(name: str, config: dict[str, Any]) -> None:
    theirs, ours = pair(name, **config)
    for key, value in vars(theirs).items():
        if key == "_internal_dict":
            assert dict(ours.config) == dict(value) or "trained_betas" in config
        elif isinstance(value, torch.Tensor):
            assert torch.equal(getattr(ours, key), value), key
            assert getattr(ours, key).dtype is value.dtype, key
        else:
            assert getattr(ours, key) == value, key
    assert (ours.order, len(ours)) == (theirs.order, len(theirs))
    assert {c.__name__ for c in ours.compatibles} == {c.__name__ for c in theirs.compatibles}


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_schedules_that_only_ddpm_has(schedule: str) -> None:
    theirs, ours = pair("DDPMScheduler", beta_schedule=schedule, num_train_timesteps=40)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    theirs, ours = getattr(diffusers, name), OURS[name]

    def parameters(function: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.name != "strict"]

    assert parameters(ours.__init__) == parameters(theirs.__init__)
    for method in PUBLIC:
        assert hasattr(ours, method) == hasattr(theirs, method), method
        if hasattr(theirs, method):
            assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method)), method


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_saved_by_either_loads_in_the_other(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    theirs, ours = pair(name, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [tmp_path / kind / "scheduler_config.json" for kind in ("theirs", "ours")]
    assert files[0].read_text() == files[1].read_text()
    assert json.loads(files[1].read_text())["_class_name"] == name
    loaded = OURS[name].from_pretrained(tmp_path / "theirs")
    back = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert dict(loaded.config) == dict(back.config)
    assert torch.equal(loaded.alphas_cumprod, back.alphas_cumprod)


@pytest.mark.parametrize("name", NAMES)
def test_from_config_between_classes(name: str) -> None:
    theirs = getattr(diffusers, name)(beta_schedule="scaled_linear", steps_offset=1)
    ours = OURS[name].from_config(theirs.config)
    assert dict(ours.config) == dict(theirs.config)
    assert type(getattr(diffusers, name).from_config(ours.config)) is getattr(diffusers, name)
    euler = diffusers.EulerDiscreteScheduler.from_config(ours.config)
    assert euler.config.beta_schedule == "scaled_linear"
    other = OURS["DDPMScheduler"].from_config(ours.config, clip_sample=False)
    assert (other.config.steps_offset, other.config.clip_sample) == (1, False)
    assert OURS["DDIMScheduler"].from_config(other.config).config.beta_schedule == "scaled_linear"
    made, unused = OURS[name].from_config(theirs.config, return_unused_kwargs=True, surplus=1)
    assert unused["surplus"] == 1
    assert made.strict


@pytest.mark.parametrize("name", NAMES)
def test_strict_is_no_part_of_the_configuration(name: str, tmp_path: Path) -> None:
    lax = OURS[name](strict=False, steps_offset=1)
    assert "strict" not in lax.config
    lax.save_pretrained(tmp_path)
    assert "strict" not in (tmp_path / "scheduler_config.json").read_text()
    assert OURS[name].from_pretrained(tmp_path).strict
    assert not OURS[name].from_pretrained(tmp_path, strict=False).strict
    assert not OURS[name].from_config(lax.config, strict=False).strict


def test_the_old_name_of_set_alpha_to_one() -> None:
    scheduler = OURS["DDIMInverseScheduler"](set_alpha_to_zero=False)
    assert scheduler.initial_alpha_cumprod == scheduler.alphas_cumprod[0]


class Pipeline(DiffusionPipeline):
    """The least a pipeline needs: a model and a scheduler."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


def _unet() -> Any:
    return diffusers.UNet2DModel(
        sample_size=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_with_ours_is_saved_as_theirs(name: str, tmp_path: Path) -> None:
    pipe = Pipeline(_unet(), OURS[name](steps_offset=1))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name]
    loaded = Pipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is getattr(diffusers, name)
    assert loaded.scheduler.config.steps_offset == 1
    passed = Pipeline.from_pretrained(tmp_path, scheduler=OURS[name](clip_sample=False))
    assert type(passed.scheduler) is OURS[name]
    assert passed.to("cpu").scheduler.config.clip_sample is False


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(name: str, clone: Callable[[Any], Any]) -> None:
    scheduler = OURS[name](prediction_type="v_prediction", strict=False)
    scheduler.set_timesteps(6)
    kwargs = {"generators": 0} if name == "DDIMInverseScheduler" else {}
    before = run(scheduler, **kwargs)  # with rows in the cache
    twin = clone(scheduler)
    assert type(twin) is OURS[name]
    assert not twin.strict
    assert_same(run(twin, **kwargs), before, scheduler.alphas_cumprod)


CHANGES: dict[str, Callable[[Any], None]] = {
    "attribute of the configuration": lambda s: setattr(s.config, "prediction_type", "sample"),
    "register_to_config": lambda s: s.register_to_config(clip_sample_range=0.3),
    "new configuration": lambda s: setattr(
        s, "_internal_dict", FrozenDict({**s.config, "clip_sample": False})
    ),
    "thresholding": lambda s: s.register_to_config(thresholding=True, sample_max_value=3.0),
    "other alphas_cumprod": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2),
    "alphas_cumprod in place": lambda s: s.alphas_cumprod.mul_(0.9),
    "other end": lambda s: setattr(
        s, "final_alpha_cumprod" if hasattr(s, "final_alpha_cumprod") else "one", torch.tensor(0.95)
    ),
    "step count": lambda s: s.set_timesteps(9),
    "list in place": lambda s: s.timesteps[1:3].sub_(5),
    "other list": lambda s: setattr(s, "timesteps", s.timesteps[::2].clone()),
}


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_first_loop_take_effect(name: str, change: str) -> None:
    theirs, ours = pair(name)
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
        first = run(scheduler)
        CHANGES[change](scheduler)
        loops.append(run(scheduler))
        assert not torch.equal(loops[-1].samples[-1], first.samples[-1])
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


def test_rows_are_built_once_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    for name in ("DDIMScheduler", "DDPMScheduler"):
        cls = OURS[name]
        rows = cls._rows
        monkeypatch.setattr(
            cls, "_rows", lambda self, t, *o, rows=rows: built.append(t) or rows(self, t, *o)
        )
        scheduler = cls()
        scheduler.set_timesteps(20)
        for _ in range(3):
            run(scheduler)
    assert [len(t) for t in built] == [20, 20]


ALL_VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]


@pytest.mark.parametrize("kind", [*ALL_VARIANCES, "learned", "learned_range", "other"])
def test_get_variance(kind: str) -> None:
    theirs, ours = pair("DDPMScheduler", variance_type=kind)
    predicted = torch.rand(ODD)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(20)
    for t in (950, 400, 0):
        a, b = (s._get_variance(t, predicted_variance=predicted) for s in (theirs, ours))
        torch.testing.assert_close(b, a, rtol=1e-6, atol=0)
        a, b = (s._get_variance(t, predicted, variance_type="fixed_large") for s in (theirs, ours))
        assert torch.equal(a, b)
    theirs, ours = pair("DDIMScheduler")
    for t, s in ((999, 979), (19, -1), (0, 0)):
        assert torch.equal(ours._get_variance(t, s), theirs._get_variance(t, s))


@pytest.mark.parametrize(
    ("attribute", "config"), [("fixed_large", "fixed_small"), ("learned", "fixed_large")]
)
def test_the_variance_is_that_of_the_configuration(attribute: str, config: str) -> None:
    """The attribute, where it was exchanged, only says whether the output holds a variance."""
    theirs, ours = pair("DDPMScheduler", variance_type=config)
    loops = []
    for scheduler in (theirs, ours):
        scheduler.variance_type = attribute
        scheduler.set_timesteps(5)
        loops.append(run(scheduler, channels=2 * ODD[1] if attribute == "learned" else None))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


def test_previous_timestep() -> None:
    theirs, ours = pair("DDPMScheduler")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(timesteps=[100, 87, 50, 1])
    for t in theirs.timesteps:
        mine, other = ours.previous_timestep(t), theirs.previous_timestep(int(t))
        assert torch.equal(mine, other)
        assert mine.dtype is other.dtype


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_forward_process(name: str, dtype: torch.dtype, method: str) -> None:
    # they compute in the dtype of the sample, we in float32 from their rounded table
    unit = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}.get(dtype, 1e-6)
    x0, noise = torch.randn(4, 3, 5, 7).to(dtype), torch.randn(4, 3, 5, 7).to(dtype)
    theirs, ours = pair(name)
    for t in ([0, 1, 500, 999], [3], [-1, -1000, 0, 2]):
        for kind in (torch.int64, torch.int32):
            timesteps = torch.tensor(t, dtype=kind)
            a, b = (getattr(s, method)(x0, noise, timesteps) for s in (theirs, ours))
            torch.testing.assert_close(b, a, rtol=unit, atol=4 * unit)
    ours.alphas_cumprod = ours.alphas_cumprod * 0.5
    theirs.alphas_cumprod = theirs.alphas_cumprod * 0.5
    a, b = (getattr(s, method)(x0, noise, torch.tensor([0])) for s in (theirs, ours))
    torch.testing.assert_close(b, a, rtol=unit, atol=4 * unit)


def test_half_precision_noise_keeps_its_noise_where_not_strict() -> None:
    """1 - abar_0 = 1e-4 is 0 in bfloat16: theirs adds no noise at all there."""
    x0, noise = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), torch.ones(1, 1, 8, 8).bfloat16()
    theirs, ours = pair("DDPMScheduler")
    lax = OURS["DDPMScheduler"](strict=False)
    added = [s.add_noise(x0, noise, torch.tensor([0])) for s in (theirs, ours, lax)]
    assert float(added[0].abs().max()) == float(added[1].abs().max()) == 0
    torch.testing.assert_close(added[2].float(), noise.float() * 0.01, rtol=2.0**-8, atol=0)


X = torch.randn(1, 3, 4, 4)


def test_noise_of_another_dtype_promotes_as_in_theirs() -> None:
    x, noise = torch.randn(ODD).half(), torch.randn(ODD)
    results = []
    for scheduler in pair("DDIMScheduler"):
        scheduler.set_timesteps(5)
        results.append(scheduler.step(x.flip(0), 600, x, eta=1.0, variance_noise=noise))
    theirs, ours = results
    assert ours.prev_sample.dtype is theirs.prev_sample.dtype is torch.float32
    assert ours.pred_original_sample.dtype is theirs.pred_original_sample.dtype is torch.float16
    assert (ours.prev_sample - theirs.prev_sample).abs().max() < 2.0**-7  # they compute in half


def test_tensor_timesteps_of_any_form() -> None:
    theirs, ours = pair("DDIMScheduler")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    expected = theirs.step(X, 300, X).prev_sample
    for t in (300, np.int64(300), torch.tensor(300), torch.tensor([300]), torch.tensor(300).int()):
        close(ours.step(X, t, X).prev_sample, expected, 1.0, repr(t))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("made_inside", [True, False])
def test_inference_mode(name: str, made_inside: bool) -> None:
    theirs, ours = pair(name)
    with torch.inference_mode():
        scheduler = OURS[name]() if made_inside else ours
        theirs.set_timesteps(5)
        scheduler.set_timesteps(5)
        loops = [run(s) for s in (theirs, scheduler)]
        assert scheduler.add_noise(X, X, torch.tensor([4])).shape == X.shape
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)
    assert_same(run(scheduler), loops[0], theirs.alphas_cumprod)
    output = X.clone().requires_grad_()  # rows that inference made serve autograd too
    scheduler.step(output, scheduler.timesteps[0], X).prev_sample.sum().backward()
    assert output.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_another_default_device_changes_nothing(name: str) -> None:
    ours = OURS[name]()
    ours.set_timesteps(5)
    expected = [ours.step(X, t, X).pred_original_sample for t in ours.timesteps]
    other = OURS[name]()
    with torch.device("meta"):
        other.set_timesteps(5)
        assert other.timesteps.device.type == "cpu"
        for t, x0 in zip(other.timesteps, expected, strict=True):
            assert torch.equal(other.step(X, t, X).pred_original_sample, x0)


def test_a_view_of_the_list_is_found_without_reading_it() -> None:
    """How a timestep on a GPU is looked up, where reading it would wait for the GPU."""
    listed = torch.arange(20).flip(0)
    assert [place_in(t, listed) for t in listed] == list(range(20))
    assert [place_in(t, listed) for t in listed[5:]] == list(range(5, 20))
    assert place_in(listed[3:4], listed) == 3
    assert place_in(listed[3:5], listed) is None
    assert place_in(listed[3].clone(), listed) is None
    assert place_in(listed[3].int(), listed) is None
    assert place_in(listed[3], listed[4:]) is None
    assert place_in(listed[0], listed[::2]) is None
