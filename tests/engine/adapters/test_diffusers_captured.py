"""A pipeline whose U-Net is replayed as a graph; graphs of CUDA are emulated on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.adapters import diffusers_zoo
from tests.engine.adapters.diffusers_models import SAME, build, call, psnr, spread
from tests.engine.compile.emulated_graphs import EmulatedGraphs

from stepfuse.engine.adapters.diffusers import accelerate, explain, restore
from stepfuse.engine.compile import captured


@pytest.mark.parametrize("name", ["DDIMPipeline", "StableDiffusionPipeline"])
def test_images_of_a_captured_unet(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = EmulatedGraphs()
    pipe = build(name, tmp_path)
    expected = call(pipe)
    monkeypatch.setattr(captured, "GRAPHS", graphs)
    accelerate(pipe)
    assert spread(expected) > 0.01
    for _ in range(2):
        assert psnr(call(pipe), expected) > SAME
    # four evaluations each: by one graph, of the table
    assert [graph.replays for graph in graphs.made] == [8]
    assert "captured, 8 replays" in explain(pipe)
    call(pipe, num_inference_steps=3)
    assert [graph.replays for graph in graphs.made] == [11]
    restore(pipe)
    assert psnr(call(pipe), expected) == float("inf")


@pytest.mark.parametrize("name", ["StableDiffusionXL", "DiT", "Flux", "TextToVideo"])
def test_captured_models_of_other_pipelines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dicts of conditions, timesteps that are floats, five dimensions: one graph of three calls."""
    graphs = EmulatedGraphs()
    pipe = diffusers_zoo.build(name)
    expected = diffusers_zoo.call(pipe, name)
    monkeypatch.setattr(captured, "GRAPHS", graphs)
    accelerate(pipe)
    for _ in range(2):
        found = diffusers_zoo.call(pipe, name)
        assert psnr(found, expected, peak=float(expected.abs().max())) > SAME
    assert [graph.replays for graph in graphs.made] == [6]


def test_a_captured_controlnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results, a tuple of tensors, are the next graph's arguments."""
    graphs, name = EmulatedGraphs(), "ControlNet"
    pipe = diffusers_zoo.build(name)
    expected = diffusers_zoo.call(pipe, name)
    monkeypatch.setattr(captured, "GRAPHS", graphs)
    accelerate(pipe)
    assert psnr(diffusers_zoo.call(pipe, name), expected) > SAME
    assert [graph.replays for graph in graphs.made] == [3, 3]
