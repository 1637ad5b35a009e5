"""onnx_loop: one file, run by ONNX Runtime alone, gives the images of `Sampler`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.export.export_case import CLASSES, network
from tests.engine.export.export_case import SIDE as UNET_SIDE
from tests.engine.export.onnx_case import CHANNELS, SCHEDULE, SIDE, Small, inputs, run
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.export.to_onnx import loop_graph
from stepfuse.engine.export.to_onnx import write as onnx_write
from stepfuse.kernels.step_row import Column

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

IMAGES = 1e-4  # of pixels of order 1: float32 in another order, carried through all steps
PLAIN, LEARNED = Small(), Small(out=2 * CHANNELS)

pytestmark = pytest.mark.usefixtures("once")


def export(path: Path, model: nn.Module = PLAIN, **options: Any) -> Any:
    """A sampler of a `Small`, for batches 1 .. 4."""
    settings: dict[str, Any] = {
        "example_inputs": inputs(),
        "batch": "1:2:4",
        "verify": False,
        "schedule": SCHEDULE,
        "prediction_type": "epsilon",
    }
    return sf.export.onnx_loop(model, path, **{**settings, **options})


def test_digits_are_the_same_pictures(digits: sf.Checkpoint, tmp_path: Path) -> None:
    made = sf.export.onnx_loop(digits, tmp_path / "sampler.onnx", steps=50, verify=False)
    x = torch.randn(3, *digits.sample_shape)
    labels = torch.tensor([4, 10, 9])
    got = run(made.path, {"x_T": x, "labels": labels})
    sampler = sf.Sampler(digits.model, digits.schedule, steps=50)
    expected = sampler.sample(x.shape, x_T=x, condition={"labels": labels})
    torch.testing.assert_close(got, expected, atol=IMAGES, rtol=0)
    assert expected.std() > 0.3
    model = onnx.load(made.path)
    onnx.checker.check_model(made.path, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Loop"]
    assert not model.functions
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    # the network is there once
    body = Counter(node.op_type for node in model.graph.node[0].attribute[0].g.node)
    convolutions = [m for m in digits.model.modules() if isinstance(m, nn.Conv2d)]
    assert body["Conv"] == len(convolutions)
    said = made.metadata
    assert said == sf.export.read_metadata(made.path)
    assert (said.kind, said.sampler["timesteps"]) == ("sampler", sampler.timesteps)
    with pytest.raises(ValueError, match="holds a whole sampler; accepted: a denoiser"):
        sf.OnnxDenoiser(made.path)


SETTINGS = {
    "stochastic": {"eta": 1.0},
    "ancestral": {"method": "ddpm", "variance_type": "fixed_large"},
    "unclipped v": {"prediction_type": "v_prediction", "clip_sample": None, "spacing": "trailing"},
    "own epsilon": {"rederive_epsilon": False, "final_alpha_one": False, "clip_sample": 0.5},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_the_sampler(tmp_path: Path, case: str) -> None:
    settings: dict[str, Any] = {"steps": 6, **SETTINGS[case]}
    made = export(tmp_path / "s.onnx", **settings)
    compare(made, PLAIN, **settings)


SOLVERS: dict[str, dict[str, Any]] = {
    "dpmpp": {"method": "dpmpp"},
    "third order": {"method": "dpmpp", "order": 3, "strict": False, "clip_sample": None},
    "sde": {"method": "dpmpp_sde", "solver_type": "heun"},
    "unipc": {"method": "unipc", "order": 3, "prediction_type": "v_prediction"},
    "heun": {"method": "heun"},
    "plms": {"method": "plms"},
    "euler a": {"method": "euler_a"},
}


@pytest.mark.parametrize("case", SOLVERS)
def test_what_a_solver_remembers_is_carried_by_the_loop(tmp_path: Path, case: str) -> None:
    settings: dict[str, Any] = {"steps": 5, "prediction_type": "epsilon", **SOLVERS[case]}
    made = export(tmp_path / "s.onnx", **settings)
    x, _, condition = inputs(2)
    reference = sf.Sampler(PLAIN.eval(), SCHEDULE, backend="reference", graph=None, **settings)
    feed, noise = {"x_T": x, **condition}, None
    if case in ("sde", "euler a"):
        noise = feed["noise"] = torch.randn(len(reference.timesteps), *x.shape)
    assert list(made.inputs) == list(feed)
    expected = reference.sample(x.shape, x_T=x, condition=condition, noise=noise)
    torch.testing.assert_close(run(made.path, feed), expected, atol=IMAGES, rtol=0)
    loop = onnx.load(made.path).graph.node[-1]
    assert len(loop.input) == 3 + reference.plan.slots
    assert made.metadata.sampler["timesteps"] == reference.timesteps
    onnx.checker.check_model(made.path, full_check=True)


def test_a_file_takes_whole_timesteps_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"timesteps must be whole numbers: .* got 20\.5"):
        export(tmp_path / "s.onnx", method="euler", timesteps=[20.5, 3])
    assert not list(tmp_path.iterdir())


def test_a_learned_variance(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 5, "method": "ddpm", "variance_type": "learned_range"}
    made = export(tmp_path / "learned.onnx", LEARNED, **settings)
    compare(made, LEARNED, **settings)


def compare(made: Any, model: nn.Module, **settings: Any) -> None:
    """Two images by the file, alone and together, and by the engine."""
    x, _, condition = inputs(2)
    feed = {"x_T": x, **condition}
    arguments: dict[str, Any] = {"x_T": x, "condition": condition}
    noisy = "eta" in settings or "method" in settings
    if noisy:
        feed["noise"] = arguments["noise"] = torch.randn(settings["steps"], *x.shape)
    assert list(made.inputs) == list(feed)
    settings = {"prediction_type": "epsilon", **settings}
    reference = sf.Sampler(model.eval(), SCHEDULE, backend="reference", graph=None, **settings)
    expected = reference.sample(x.shape, **arguments)
    got = run(made.path, feed)
    torch.testing.assert_close(got, expected, atol=IMAGES, rtol=0)
    second = {name: v[:, 1:] if name == "noise" else v[1:] for name, v in feed.items()}
    torch.testing.assert_close(run(made.path, second), expected[1:], atol=IMAGES, rtol=0)
    if noisy:
        still = run(made.path, {**feed, "noise": torch.zeros_like(feed["noise"])})
        assert (still - got).abs().max() > 100 * IMAGES


def test_guidance_goes_through_the_network_as_one_batch(tmp_path: Path) -> None:
    schedule, shape = sf.Schedule.linear(100), (1, UNET_SIDE, UNET_SIDE)
    guidance = sf.CFG(2.5, unconditional={"labels": None})
    made = export(
        tmp_path / "guided.onnx",
        network(),
        example_inputs=None,
        sample_shape=shape,
        schedule=schedule,
        steps=7,
        guidance=guidance,
        verify=True,
    )
    assert "batch 1: max abs" in made.verified
    assert made.metadata.sampler["guidance_scale"] == 2.5
    x, labels = torch.randn(3, *shape), torch.tensor([0, CLASSES, 2])
    sampler = sf.Sampler(network(), schedule, steps=7, guidance=guidance)
    expected = sampler.sample(x.shape, x_T=x, condition={"labels": labels})
    unguided = sf.Sampler(network(), schedule, steps=7)
    plain = unguided.sample(x.shape, x_T=x, condition={"labels": labels})
    got = run(made.path, {"x_T": x, "labels": labels})
    # 2.5 c - 1.5 u carries four times the rounding of c and u, at every step
    torch.testing.assert_close(got, expected, atol=4 * IMAGES, rtol=0)
    assert (expected - plain).abs().max() > 100 * IMAGES


def test_weights_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = export(tmp_path / "inside.onnx", steps=3)
    monkeypatch.setattr(onnx_write, "_SMALL", 100)
    outside = export(tmp_path / "outside.onnx", steps=3, external_data=True, verify=True)
    assert outside.data is not None
    x, _, condition = inputs(3)
    feed = {"x_T": x, **condition}
    assert torch.equal(run(outside.path, feed), run(inside.path, feed))


def test_a_wrong_loop_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = loop_graph.looped

    def forgetful(model: Any, loop: Any) -> Any:
        table: Tensor = loop.table.clone()
        table[-1, Column.C_0] *= 0.9
        return build(model, replace(loop, table=table))

    monkeypatch.setattr("stepfuse.engine.export.to_onnx.loop_file.looped", forgetful)
    with pytest.raises(ValueError, match="differs from the network by"):
        export(tmp_path / "wrong.onnx", steps=3, verify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": None}, "give schedule=... and prediction_type=..."),
        ({"prediction_type": None}, "give schedule=... and prediction_type=..."),
        ({"steps": 41}, "41"),
        ({"eta": 2.0}, r"eta must be in \[0, 1\]; got 2.0"),
        ({"guidance": sf.CFG(3.0, rescale=0.7)}, "guidance must be a CFG without rescale"),
        ({"guidance": sf.CFG(3.0)}, "needs unconditional="),
        ({"guidance": sf.CFG(3.0, {"text": None})}, "no condition 'text'; accepted: labels"),
        ({"guidance": sf.CFG(3.0, {"labels": None})}, "'labels' must be a tensor; got None"),
        ({"guidance": sf.CFG(3.0, {"labels": torch.zeros(2, 3)})}, "must broadcast to"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "bad.onnx", **options)
    with pytest.raises(TypeError, match="dynamic_size"):
        export(tmp_path / "bad.onnx", dynamic_size=True)
    with pytest.raises(TypeError, match=r"guidance must be a CFG, .* or None; got float"):
        export(tmp_path / "bad.onnx", guidance=3.0)
    assert not list(tmp_path.iterdir())


def test_the_image_size_is_that_of_the_example(tmp_path: Path) -> None:
    made = export(tmp_path / "size.onnx", steps=3)
    assert made.inputs == {"x_T": ("batch", CHANNELS, SIDE, SIDE), "labels": ("batch",)}
