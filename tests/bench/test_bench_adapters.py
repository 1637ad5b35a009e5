"""The benchmark of the adapters: images first, times only for what is right, and its own cases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engine.adapters import guided_diffusion_oracle as oracle
from tests.engine.adapters.diffusers_models import build, call
from torch import Tensor

import stepfuse as sf
from stepfuse.bench import adapter_cases, bench_adapters
from stepfuse.bench.adapter_cases import Case
from stepfuse.bench.verify import psnr


def missing() -> Any:
    raise ImportError("No module named 'absent'")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small cases: one right, one whose images change at every call, one without its library."""
    turn = iter(range(100))

    def run(pipe: Any) -> Tensor:
        return torch.as_tensor(call(pipe, num_inference_steps=2))

    def changing(pipe: Any) -> Tensor:
        return run(pipe) * (1 + next(turn))

    def tiny() -> Any:
        return build("DDIMPipeline", tmp_path)

    cases = [
        Case("diffusers", "tiny right", tiny, run),
        Case("diffusers", "tiny wrong", tiny, changing),
        Case("absent", "left out", missing, run),
    ]
    monkeypatch.setattr(bench_adapters, "cases", lambda: cases)


@pytest.mark.usefixtures("few")
def test_a_case_that_is_right_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    assert bench_adapters.main(["--match", "right", "--rounds", "2", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    (row,) = record["cases"]
    assert row["psnr"]["after"] > 50
    assert {name: len(seconds) for name, seconds in row["samples"].items()} == {
        "before": 2,
        "after": 2,
        "after, bfloat16": 2,
    }
    assert record["versions"]["diffusers"]
    assert "tiny right" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_wrong_images_get_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    assert bench_adapters.main(["--match", "wrong", "--rounds", "1", "--json", str(file)]) == 1
    record = json.loads(file.read_text())
    assert record["cases"] == []
    assert "under 50" in record["left out"]["diffusers tiny wrong"]
    assert "left out" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_a_missing_library_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_adapters.main(["--match", "left out", "--rounds", "1"]) == 0
    assert "absent left out left out: No module named 'absent'" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--match", "nothing"], "tiny right"),
        (["--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["--threads", "0"], "--threads must be at least 1; got 0"),
    ],
)
def test_arguments_that_cannot_be_meant(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_adapters.main(arguments)
    assert said in capsys.readouterr().err


def test_digits_without_labels_are_those_of_the_null_class() -> None:
    x, t = torch.randn(2, *sf.load("digits").sample_shape), torch.tensor([10, 900])
    with torch.no_grad():
        found = adapter_cases.digits()(x, t).sample
        expected = sf.load("digits").model(x, t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_case_has_a_name_of_its_own() -> None:
    names = [str(case) for case in adapter_cases.cases()]
    assert len(set(names)) == len(names) > 8
    assert {case.library for case in adapter_cases.cases()} == {
        "diffusers",
        "denoising-diffusion-pytorch",
        "guided-diffusion",
    }


def test_guided_diffusion_from_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules are stood in for; what is checked is what the cases ask of them."""
    monkeypatch.delenv(adapter_cases.CHECKOUT, raising=False)
    monkeypatch.setitem(sys.modules, "guided_diffusion.gaussian_diffusion", None)
    with pytest.raises(ImportError, match="GUIDED_DIFFUSION=FOLDER"):
        adapter_cases.guided_diffusion()

    def spaced(use_timesteps: list[int], loss_type: Any, **options: Any) -> Any:
        return oracle.Spaced(use_timesteps, **options)

    diffusion = SimpleNamespace(
        get_named_beta_schedule=lambda name, total: torch.linspace(1e-4, 0.02, total).tolist(),
        ModelMeanType=oracle.MeanType,
        ModelVarType=oracle.VarType,
        LossType=SimpleNamespace(MSE=None),
    )
    respace = SimpleNamespace(
        space_timesteps=lambda total, steps: range(0, total, total // 2), SpacedDiffusion=spaced
    )
    monkeypatch.setitem(sys.modules, "guided_diffusion.gaussian_diffusion", diffusion)
    monkeypatch.setitem(sys.modules, "guided_diffusion.respace", respace)
    for case in adapter_cases.cases():
        if case.library == "guided-diffusion":
            with torch.no_grad():
                plain = case.build()
                before = case.run(plain)
                after = case.run(sf.accelerate(plain))
            assert before.shape == (4, *sf.load("digits").sample_shape)
            assert psnr(after, before, least=0.0) > 50
