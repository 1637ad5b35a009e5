"""onnx_loop with a solver and a guidance of a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.export.onnx_case import CHANNELS, CLASSES, SCHEDULE, SIDE, Small, inputs, run
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.sampling.steps import Steps
from stepfuse.engine.sampling.update import Update

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

IMAGES = 4e-4  # of pixels of order 1, through a guided loop
NOTHING = {"labels": torch.tensor([CLASSES])}


def mine(schedule: sf.Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    steps = Steps.down(schedule, timesteps, update)
    steps.implicit(steps.posterior_variance, torch.zeros_like(steps.a))
    return steps.table


class Early:
    """Guides the early steps alone."""

    evaluations = 2
    mixture = True
    unconditional = NOTHING
    scale = 99.0  # of no meaning: `scale_at` counts

    def scale_at(self, t: int) -> float:
        return 3.0

    def is_active(self, t: int) -> bool:
        return t > 20

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
        unguided = denoiser(x, t, denoiser.unconditional)
        return sf.Outputs(denoiser(x, t, condition), unguided)


class Other(sf.CFG):
    """No mixture any more."""

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
        return sf.Outputs(denoiser(x, t, condition) * 0.5)


def export(path: Path, **options: Any) -> Any:
    settings = {"example_inputs": inputs(), "batch": "1:2:4", "schedule": SCHEDULE}
    return sf.export.onnx_loop(
        Small(), path, **settings, prediction_type="epsilon", steps=5, **options
    )


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"method": sf.Method(mine)}, None),
        ({"guidance": Early()}, 3.0),
        ({"guidance": Early(), "method": sf.Method(mine)}, 3.0),
    ],
)
def test_it_is_in_the_file(tmp_path: Path, options: dict[str, Any], scale: float | None) -> None:
    made = export(tmp_path / "loop.onnx", verify=True, **options)
    described = made.metadata.sampler
    assert described["guidance_scale"] == scale
    assert described["method"] == ("mine" if "method" in options else "ddim")
    x, labels = torch.randn(2, CHANNELS, SIDE, SIDE), torch.tensor([1, 2])
    sampler = sf.Sampler(Small().eval(), SCHEDULE, steps=5, **options)
    expected = sampler.sample(x.shape, x_T=x, condition={"labels": labels})
    got = run(made.path, {"x_T": x, "labels": labels})
    torch.testing.assert_close(got, expected, atol=IMAGES, rtol=0)
    plain = sf.Sampler(Small().eval(), SCHEDULE, steps=5)
    assert not torch.allclose(
        plain.sample(x.shape, x_T=x, condition={"labels": labels}), expected, atol=IMAGES
    )


def test_a_subclass_with_other_outputs_is_no_mixture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="guidance must be a CFG without rescale, or another"):
        export(tmp_path / "loop.onnx", guidance=Other(2.0, NOTHING), verify=False)
    assert not list(tmp_path.iterdir())
