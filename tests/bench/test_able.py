"""A candidate that cannot run here is named and left out, in every benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from stepfuse.bench import (
    bench_adapters,
    bench_sampler,
    bench_unet,
    harness,
    products,
    suite,
    timing,
    unet_candidates,
)
from stepfuse.bench.able import able, described
from stepfuse.bench.adapter_cases import Case

TINY = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("\n  no such primitive\nat some address")


def wrong() -> Any:
    raise AssertionError("off by 3")


def test_what_raises_is_named_and_the_others_are_made() -> None:
    said: list[str] = []
    assert able({"a": lambda: 1, "b": refuse, "c": lambda: 3}, said.append) == {"a": 1, "c": 3}
    assert said == ["b left out: RuntimeError: no such primitive"]
    with pytest.raises(AssertionError, match="off by 3"):
        able({"a": wrong}, said.append)
    assert described(KeyError()) == "KeyError"


def test_the_benchmark_of_networks_where_oneDNN_has_float32_only(tmp_path: Path) -> None:
    """The whole command, on what a CPU without AVX-512 offers."""
    config, record = tmp_path / "tiny.json", tmp_path / "record.json"
    config.write_text(json.dumps(TINY))
    what = ["--config", str(config), "--batch", "1", "--rounds", "1", "--no-images"]
    done = subprocess.run(
        [sys.executable, "-m", "stepfuse.bench.bench_unet", *what, "--peers", "eager",
         "--json", str(record)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "STEPFUSE_ISA": "avx2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "products bf16 left out: RuntimeError: " in done.stderr
    assert "Traceback" not in done.stderr
    (result,) = json.loads(record.read_text())["results"]
    assert list(result["products_seconds"]) == ["fp32"]
    assert {row["name"] for row in result["candidates"]} >= {"eager", "stepfuse-bf16"}


@torch.no_grad()
def test_products_leave_no_hook_behind_where_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, shape = unet_candidates.network("cifar10", TINY, 1)
    x, t = unet_candidates.inputs(shape)
    monkeypatch.setattr(products, "_linear", refuse)
    assert bench_unet.sums_of_products(model, x, t) == {}
    assert "products fp32 left out: RuntimeError: no such primitive" in capsys.readouterr().err
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_candidates_of_a_network_and_the_table_without_products(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def optimized(model: Any, inputs: Any, dtype: Any, **_: Any) -> Any:
        return refuse() if dtype else model

    monkeypatch.setattr(unet_candidates, "optimize", optimized)
    model, shape = unet_candidates.network("cifar10", TINY, 1)
    x, t = unet_candidates.inputs(shape)
    found = bench_unet.candidates(model, x, t, ["eager"])
    assert [c.name for c in found] == ["stepfuse-fp32", "stepfuse-fp32-kept", "eager"]
    assert "stepfuse-bf16 left out: RuntimeError: no such primitive" in capsys.readouterr().err
    assert bench_unet.time_in_turn(found, x, t, {}, 1) == {}
    assert all(len(c.seconds) == len(c.cpu_seconds) == 1 for c in found)
    bench_unet.show(Console(width=140), 1, found, {})
    assert "stepfuse-fp32-kept" in capsys.readouterr().out


def test_loops_of_the_sampler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sampler(steps: int, **more: Any) -> Any:
        return refuse() if more.get("optimize") is torch.bfloat16 else SimpleNamespace()

    network = SimpleNamespace(
        name="tiny",
        theirs=lambda *_: torch.zeros(1),
        ours=lambda *_: torch.zeros(1),
        sampler=sampler,
        verify=lambda *_: 1e-4,
    )
    row = bench_sampler.against_diffusers(network, 1, 2, 1)
    assert list(row["samples"]) == ["diffusers", "eager", "captured", "optimized"]
    assert "in bfloat16 left out: RuntimeError: no such primitive" in capsys.readouterr().err
    results = {
        "loops": [row],
        "outside": [],
        "linearity": {"network": "tiny", "steps": 1.0, "batch": 1.0},
        "watching": {"network": "tiny", "progress": 0.0, "callback": 0.0},
    }
    bench_sampler.report(results, Console(width=140))
    assert "1.0e-04" in capsys.readouterr().out


def test_accelerated_pipelines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def accelerate(pipe: Any, **options: Any) -> Any:
        return refuse() if options else pipe

    monkeypatch.setattr(bench_adapters.sf, "accelerate", accelerate)
    image = torch.rand(1, 3, 4, 4)
    cases = [
        Case("a", "able", lambda: "pipe", lambda pipe: image),
        Case("b", "unable", refuse, lambda pipe: image),
    ]
    monkeypatch.setattr(bench_adapters, "cases", lambda: cases)
    assert bench_adapters.main(["--rounds", "1"]) == 0
    shown = capsys.readouterr()
    assert "after, bfloat16 left out: RuntimeError: no such primitive" in shown.err
    assert "b unable left out: RuntimeError: no such primitive" in shown.out
    assert "inf" in shown.out


def kernel_case(**candidates: Any) -> harness.Case:
    def make() -> harness.Inputs:
        return {"x": torch.zeros(4)}

    work = {harness.OURS: torch.clone, harness.INTO: torch.clone, **candidates}
    calls = {name: (lambda inputs, call=call: call(inputs["x"])) for name, call in work.items()}
    return harness.Case("tiny", torch.float32, make, calls, 32, lambda: None)


def test_candidates_of_an_op(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1 << 10)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-5)
    case = kernel_case(eager=refuse)
    case.compiled = refuse
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0)
    result = harness.measure(case, 2, with_compile=True)
    shown = capsys.readouterr().err
    assert "eager left out: RuntimeError" in shown
    assert "compile left out: RuntimeError" in shown
    assert (result.ratio("eager"), result.ratio("compile")) == (None, None)
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "1", "--no-compile"])
    cases = [kernel_case(stepfuse=refuse), kernel_case()]
    harness.run("title", lambda device: cases, {"eager": "eager"})
    assert "stepfuse left out: RuntimeError" in capsys.readouterr().err


def test_a_benchmark_of_the_suites_is_skipped_and_a_wrong_one_fails() -> None:
    benchmark = SimpleNamespace(extra_info={}, name="test_x")
    timed = suite.Timed(benchmark)
    arguments: dict[str, Any] = {
        "beside": lambda: None,
        "reference": "eager",
        "dtype": "float32",
        "group": "g",
    }
    with pytest.raises(pytest.skip.Exception, match="left out: RuntimeError: no such primitive"):
        timed(lambda: None, verify=refuse, **arguments)
    with pytest.raises(AssertionError, match="off by 3"):
        timed(lambda: None, verify=wrong, **arguments)


def test_architectures_of_the_roofline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from stepfuse.bench import roofline

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def submit(self, call: Any, arch: int) -> Any:
            return SimpleNamespace(result=lambda: [] if arch == 90 else refuse())

    monkeypatch.setattr(roofline, "ProcessPoolExecutor", Pool)
    assert roofline.compile_all([80, 90]) == {90: []}
    assert "sm_80 left out: RuntimeError: no such primitive" in capsys.readouterr().err
    assert "sm_90" not in capsys.readouterr().err
