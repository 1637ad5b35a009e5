"""onnx on diffusers' U-Nets: inputs are found, conditions have their names, numbers agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.export.onnx_case import run
from torch import Tensor, nn

import stepfuse as sf

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

FLOAT32 = 2e-5  # of outputs of order 1: another order of summation

COMMON: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def class_conditional() -> nn.Module:
    model = diffusers.UNet2DModel(
        in_channels=3,
        out_channels=6,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        num_class_embeds=5,
        **COMMON,
    )
    return model  # type: ignore[no-any-return]


def text_conditional(**options: Any) -> nn.Module:
    model = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        **{**COMMON, **options},
    )
    return model  # type: ignore[no-any-return]


def compare(model: nn.Module, path: Path, x: Tensor, t: Tensor, **condition: Tensor) -> None:
    """The file, read by the denoiser too, against the network in float64."""
    got = run(path, {"x": x, "t": t, **condition})
    assert torch.equal(sf.OnnxDenoiser(path)(x, t, **condition), got)
    double = {k: v.double() if v.is_floating_point() else v for k, v in condition.items()}
    with torch.no_grad():
        expected = model.double().eval()(x.double(), t, **double).sample
    torch.testing.assert_close(got.double(), expected, atol=FLOAT32, rtol=0)


def test_class_labels(tmp_path: Path) -> None:
    model = class_conditional()
    made = sf.export.onnx(model, tmp_path / "classes.onnx", batch="1:2:70")
    # diffusers lays out large batches differently: both ends of the profile were compared, if so
    assert "max abs" in made.verified
    assert made.inputs == {"x": ("batch", 3, 8, 8), "t": ("batch",), "class_labels": ("batch",)}
    assert (made.metadata.variance_type, made.metadata.num_classes) == ("learned_range", None)
    assert {node.domain for node in onnx.load(made.path).graph.node} == {""}
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    compare(model, made.path, x, t, class_labels=torch.tensor([4, 0, 2]))
    with pytest.raises(ValueError, match="needs the tensor 'class_labels'; got None"):
        sf.OnnxDenoiser(made.path)(x, t)


def test_encoder_hidden_states(tmp_path: Path) -> None:
    model = text_conditional()
    text = torch.randn(1, 5, 12)
    example = (torch.randn(1, 4, 8, 8), torch.tensor([3]), {"encoder_hidden_states": text})
    made = sf.export.onnx(model, tmp_path / "t.onnx", example_inputs=example, batch=2)
    assert made.inputs["encoder_hidden_states"] == (2, 5, 12)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), torch.randn(2, 5, 12)
    compare(model, made.path, x, t, encoder_hidden_states=text)


def test_the_inputs_are_known_from_the_configuration() -> None:
    from stepfuse.engine.export.network import describe

    source = describe(text_conditional(), None, None)
    shapes = {name: tuple(value.shape) for name, value in source.inputs.items()}
    assert shapes == {"x": (1, 4, 8, 8), "t": (1,), "encoder_hidden_states": (1, 77, 12)}
    assert describe(text_conditional(), None, (4, 16, 24)).x.shape == (1, 4, 16, 24)
    for options in (
        {"addition_embed_type": "text"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
    ):
        with pytest.raises(ValueError, match="example_inputs="):
            describe(text_conditional(**options), None, None)
