"""Candidates: each makes the reference's images, and one that does not is refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.cli.cli_case import TINY, save
from torch import Tensor

from stepfuse.bench import candidates, loops
from stepfuse.bench.candidates import LIBRARIES, chosen, entry, libraries
from stepfuse.bench.loops import why_no_scheduler
from stepfuse.bench.verify import MOST_DIFFERENCE, Reference, compared
from stepfuse.bench.workload import Spec, Workload
from stepfuse.engine.sampling.sampler import Sampler

STEPS = 4


def workload(model: str, **settings: Any) -> Workload:
    return Workload(Spec(**{"model": model, "steps": STEPS, **settings}))


def needing(name: str) -> Any:
    missing = [n for n in entry(name).needs if importlib.util.find_spec(n) is None]
    reason = f"not installed: {', '.join(missing)}"
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=reason))


@pytest.mark.parametrize(
    "name",
    ["stepfuse", "stepfuse-eager", "stepfuse-bf16"]
    + [needing(n) for n in ("diffusers", "diffusers-bf16", "onnxruntime")],
)
def test_images_are_the_references(name: str, tiny: str) -> None:
    """With a network that has labels, at an odd batch; whatever of the library is beneath it."""
    work, chosen_entry = workload(tiny), entry(name)
    loop = chosen_entry.build(work, 3)
    verified, reason = Reference(work, 3).check(loop, chosen_entry.dtype)
    assert reason == ""
    assert verified is not None
    assert verified.passed
    assert verified.batch == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"eta": 0.8},
        {"method": "ddpm"},
        {"spacing": "trailing"},
        {"steps": 5, "method": "ddpm"},
        {"eta": 1.0, "steps": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["stepfuse", needing("diffusers")])
def test_noise_and_spacing_are_the_references(
    name: str, settings: dict[str, Any], tiny: str
) -> None:
    work = workload(tiny, optimize=False, **settings)
    verified, reason = Reference(work, 2).check(entry(name).build(work, 2), "fp32")
    assert reason == ""
    assert verified is not None
    assert verified.max_abs <= MOST_DIFFERENCE


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="no diffusers")
def test_another_number_of_steps_is_that_of_the_reference(tiny: str) -> None:
    """What time over steps is taken of."""
    for name in ("stepfuse", "diffusers", "stepfuse-eager"):
        loop = entry(name).build(workload(tiny), 1)
        loop.images()
        loop.prepare(2)
        exact = Reference(workload(tiny, steps=2), 1).images("philox")
        assert float((loop.images() - exact).abs().max()) <= MOST_DIFFERENCE


def test_the_reference_is_another_computation(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks neither the sampler nor the kernel that are timed."""
    work = workload(tiny)
    exact = Reference(work, 1).images("philox")

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the reference asked what it is compared with")

    monkeypatch.setattr(work, "sampler", asked)
    monkeypatch.setattr(Sampler, "sample", asked)
    monkeypatch.setattr("stepfuse.engine.sampling.program.denoise_step", asked)
    again = Reference(work, 1).images("philox")
    assert torch.equal(again, exact)
    assert tuple(exact.shape) == (1, *work.shape)


class Wrong:
    """A loop whose images are changed by ``change``."""

    draws = "philox"

    def __init__(self, exact: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        self.exact, self.change = exact, change

    def prepare(self, steps: int) -> None: ...

    def wake(self) -> None: ...

    def images(self) -> Tensor:
        return self.change(self.exact.clone())


def one_pixel(images: Tensor) -> Tensor:
    images[-1, 0, 0, 0] = 0.9 * images[-1, 0, 0, 0].clamp(-1, 1) - 0.01
    return images


@pytest.mark.parametrize(
    ("change", "dtype", "said"),
    [
        (one_pixel, "fp32", "differ from the eager float32 loop's by"),
        (lambda x: x * torch.nan, "fp32", "not finite"),
        (lambda x: x * torch.inf, "bf16", "not finite"),
        (lambda x: x[:1], "fp32", r"shape \[1, 1, 8, 8\], not \[2, 1, 8, 8\]"),
        (lambda x: -x, "bf16", r"accepted: PSNR of at least 25 dB; not timed"),
    ],
    ids=["one pixel", "nan", "infinite", "shape", "negative"],
)
def test_wrong_images_are_refused(
    change: Callable[[Tensor], Tensor], dtype: str, said: str, tiny: str
) -> None:
    reference = Reference(workload(tiny), 2)
    verified, reason = reference.check(Wrong(reference.images("philox"), change), dtype)
    assert re.search(said, reason)
    assert verified is None or not verified.passed


def test_psnr_is_that_of_its_definition() -> None:
    exact = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    verified, reason = compared(exact * 0.9, exact, "bf16")
    mean_square = float((0.1 * exact.double()).square().mean())
    assert verified.psnr == pytest.approx(10 * torch.log10(torch.tensor(4 / mean_square)).item())
    assert verified.max_abs == pytest.approx(0.1)
    assert reason == ""
    assert compared(exact, exact, "fp32")[0].psnr is None


def test_who_takes_part() -> None:
    assert [e.name for e in chosen((), "fp32")] == ["stepfuse", "stepfuse-eager"]
    assert [e.name for e in chosen(("openvino",), "bf16")] == [
        "stepfuse",
        "stepfuse-eager",
        "stepfuse-bf16",
        "openvino",
        "openvino-bf16",
    ]
    on_gpu = [e.name for e in chosen(("compile", "diffusers"), "bf16", device="cuda:1")]
    on_cpu = [e.name for e in chosen(("compile", "diffusers"), "bf16")]
    assert [name for name in on_gpu if name not in on_cpu] == [
        "diffusers-graph",
        "compile-reduce-overhead",
        "compile-max-autotune",
        "diffusers-graph-bf16",
        "compile-reduce-overhead-bf16",
        "compile-max-autotune-bf16",
    ]
    assert [name for name in on_gpu if name in on_cpu] == on_cpu
    assert {e.library for e in chosen(libraries("all"), "fp32")} == {"stepfuse", *LIBRARIES}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("none", ()),
        (" openvino , diffusers,", ("diffusers", "openvino")),
        ("all", LIBRARIES),
        ("compile,all", LIBRARIES),
    ],
)
def test_peers_by_name(text: str, names: tuple[str, ...]) -> None:
    assert libraries(text) == names


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: libraries("diffusers,tvm"), r"of diffusers, compile, .*all, none; got 'tvm'"),
        (lambda: chosen((), "fp8"), "one of fp32, bf16; got 'fp8'"),
        (lambda: chosen((), "bf16", optimize=False), "needs --optimize"),
        (lambda: entry("tvm"), "no candidate is named 'tvm'; accepted: stepfuse"),
        (lambda: Spec(graph="all"), "--graph must be one of auto, step, loop, none; got 'all'"),
        (lambda: Spec(threads=0), "--threads must be at least 1; got 0"),
        (lambda: Workload(Spec(model="no")), "unknown --model 'no'; accepted: digits, ddpm-cifar"),
        (lambda: Workload(Spec(steps=0)), "steps must be in 1 .. 1000"),
        (lambda: Workload(Spec(steps=1001)), "steps must be in 1 .. 1000"),
        (lambda: Workload(Spec(method="euler")), "euler"),
        (lambda: Workload(Spec(spacing="odd")), "odd"),
        (lambda: Workload(Spec(backend="metal")), "metal"),
    ],
)
def test_what_cannot_be_meant_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_a_missing_package_is_named_with_what_to_install() -> None:
    there = entry("openvino")
    absent = replace(there, needs=("no_such_runtime", "torch"))
    assert absent.why_not() == ("no_such_runtime is not installed; pip install no_such_runtime")
    assert replace(there, needs=("torch",)).why_not() == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "ddim_hat"}, "no scheduler for --method ddim_hat"),
        ({"spacing": "quadratic"}, "no --spacing quadratic"),
        ({"spacing": "linspace"}, "no --spacing linspace"),
        ({"method": "ddpm", "spacing": "trailing"}, "no --spacing trailing"),
        ({}, ""),
    ],
)
def test_settings_that_diffusers_lacks(settings: dict[str, Any], said: str, tiny: str) -> None:
    found = why_no_scheduler(workload(tiny, **settings))
    assert (said in found) if said else found == ""
    assert entry("stepfuse").why_not(workload(tiny, **settings)) == ""


def test_peers_of_the_cpu_are_left_out_on_a_gpu(tiny: str) -> None:
    work = workload(tiny)
    work.device = torch.device("cuda")
    for e in candidates.ENTRIES:
        reason = replace(e, needs=()).why_not(work)
        assert ("set up for the CPU here" in reason) == (e.name in candidates.CPU_ONLY), e.name
        assert "GPUs alone" not in reason
        assert ("GPUs alone" in replace(e, needs=()).why_not(workload(tiny))) == e.on_gpu


def test_a_learned_variance_has_no_loop_in_diffusers(tmp_path: Path) -> None:
    config = replace(TINY, learned_variance=True, num_classes=None)
    work = workload(save(tmp_path / "learned.safetensors", config))
    assert "variance" in why_no_scheduler(work)
    assert work.condition(2) == {}
    assert Reference(work, 2).check(entry("stepfuse-eager").build(work, 2), "fp32")[1] == ""


def test_what_is_done_is_said_as_it_is_done() -> None:
    plain = Spec(optimize=False, graph="none")
    assert entry("stepfuse").described(Spec()).how == (
        "our sampler: optimised network, captured step"
    )
    assert entry("stepfuse").described(plain).how == (
        "our sampler: network as it is, nothing captured"
    )
    for name in ("onnxruntime", "openvino"):
        assert "our plain loop" in entry(name).described(Spec()).how
    of_gpus = ("diffusers-graph", "compile-reduce-overhead", "compile-max-autotune")
    assert {e.name for e in candidates.ENTRIES if e.diffusers_loop} == {
        f"{name}{ending}" for name in ("diffusers", "compile", *of_gpus) for ending in ("", "-bf16")
    }
    assert {e.name.removesuffix("-bf16") for e in candidates.ENTRIES if e.on_gpu} == {*of_gpus}


def test_noise_of_a_generator_is_none_where_nothing_is_drawn(tiny: str) -> None:
    assert loops.generator_noise(workload(tiny), 2) is None
    noise = loops.generator_noise(workload(tiny, method="ddpm"), 2)
    assert noise is not None
    assert noise.shape == (STEPS, 2, 1, 8, 8)
    assert not noise[-1].any()
    assert bool(noise[:-1].flatten(1).any(1).all())
