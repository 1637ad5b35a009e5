"""The speed checks of the GPU check, run to the end on the CPU in its place, in small sizes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from tests.engine.compile.fake_cuda import DEVICE, fake_cuda, module_on_cuda
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepfuse.bench.gpu_check import (
    capped,
    kernel_cases,
    network_candidates,
    network_compare,
    sd_unet,
)
from stepfuse.bench.gpu_check.check import Context
from stepfuse.bench.gpu_check.checks import kernels, loop, network
from stepfuse.bench.gpu_check.device_profile import CALLS, KINDS, kind_of, summary
from stepfuse.bench.gpu_check.loop_candidates import OURS, PLAIN
from stepfuse.bench.gpu_check.network_candidates import BASE, Workload
from stepfuse.engine.compile.network import CompiledNetwork, Settings
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.sampling.lint import _Watch
from stepfuse.engine.sampling.plain_loop import plain_loop

CPU = torch.device("cpu")
# Rombach et al. 2022; the number of parameters of Stable Diffusion 1.5's U-Net
PARAMETERS = 859_520_964
FLOAT32 = 1e-5  # sums in another order, through a few layers


@pytest.fixture
def context() -> Context:
    return Context(CPU)


def test_the_network_has_the_size_of_stable_diffusion() -> None:
    model = sd_unet.build(sd_unet.Shape(), torch.device("meta"), torch.float16)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert torch.get_default_dtype() == torch.float32


@torch.no_grad()
def test_every_pass_finds_its_pattern_in_the_network() -> None:
    """Traced, not with GroupNorms exchanged one by one; and the same function."""
    model = sd_unet.build(sd_unet.TINY, CPU, torch.float32)
    x, t, text = sd_unet.inputs(sd_unet.TINY, 2, 8, CPU, torch.float32)
    fast = optimize(model, (x, t, {"encoder_hidden_states": text}), timesteps=[500])
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    matched = {report.name: report.matched for report in fast.reports}
    assert (matched["fuse_group_norm_silu"], matched["channels_last"]) == (norms, convolutions)
    assert matched["hoist_timestep"] > 0
    exact, got = model(x, t, text), fast(x, t, encoder_hidden_states=text)
    assert (got - exact).norm() < FLOAT32 * exact.norm()
    later = model(x, t + 100, text)
    assert (later - exact).norm() > 1e-3 * exact.norm(), "t is not used"
    assert (model(x, t, text + 1) - exact).norm() > 1e-3 * exact.norm(), "the text is not used"


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_the_network_is_compiled_on_cuda_in_half_precision() -> None:
    with fake_cuda():
        model = module_on_cuda(
            lambda: sd_unet.build(sd_unet.TINY, torch.device("meta"), torch.float16)
        )
        half = {"dtype": torch.float16, "device": DEVICE}
        x, text = torch.empty(2, 4, 8, 8, **half), torch.empty(2, sd_unet.TOKENS, 12, **half)
        t = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        network = CompiledNetwork(model, (x, t), {"encoder_hidden_states": text}, Settings(None))
        with Names() as names:
            result = network([x, t, text])
    assert (result.shape, result.dtype) == (x.shape, torch.float16)
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert names.seen["stepfuse::group_norm_silu"] == norms
    assert not {"aten::native_group_norm", "aten::group_norm"} & set(names.seen)


@torch.no_grad()
def test_the_network_and_the_native_operators_compile_without_a_break() -> None:
    """By PyTorch's own tracer; its compiler is left out."""
    model = sd_unet.build(sd_unet.TINY, CPU, torch.float32)
    inputs = sd_unet.inputs(sd_unet.TINY, 2, 8, CPU, torch.float32)
    fast = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(fast(*inputs), model(*inputs))
    for case in kernel_cases.cases(CPU):
        if case.dtype == "fp16" and case.shape[0] == 2:
            torch.compiler.reset()
            fast_case = torch.compile(case.native, backend="eager", fullgraph=True, dynamic=False)
            buffers = case.make()
            if case.drawn:
                assert fast_case(buffers).shape == case.native(buffers).shape
            else:
                torch.testing.assert_close(fast_case(buffers), case.native(buffers))


def test_kernels(context: Context) -> None:
    kernels.CHECK.run(context)
    assert context.wrong == []
    cases = [case.name for case in kernel_cases.cases(CPU)]
    assert len(set(cases)) == len(cases)
    assert list(context.facts["kernels"]) == cases
    for name, row in context.facts["kernels"].items():
        for who in ("ours", "native"):
            assert row[f"{who} GB/s"] > 0, (name, who)
            assert row[f"{who} of copy"] > 0
        assert row["ours error"] <= kernel_cases.TOLERANCE["bf16"]
        assert row["native / ours"] > 0
    costs = context.facts["host us of an un-captured call"]
    assert {"denoise_step", "group_norm_silu split"} <= set(costs)
    assert all(costs[name]["ours"] > 0 and costs[name]["native"] > 0 for name in costs)


def test_the_cases_of_full_size_are_on_the_gpu_from_end_to_end() -> None:
    """On a device that computes shapes, where an operand on the CPU is an error."""
    kernel_cases.abar_on_cpu()
    for noisy, guided in ((False, False), (True, False), (False, True)):
        kernel_cases.rows_on_cpu(noisy, guided)
    with fake_cuda():
        for case in kernel_cases.cases(DEVICE):
            inputs = case.make()
            with _Watch() as seen:
                results = [case.ours(inputs), case.native(inputs)]
            assert seen.problems == [], case.name  # it waits for the device, say
            dtypes = [kernel_cases.DTYPES[case.dtype]] * 2
            if "backward" not in case.op:  # autograd of a PyTorch without CUDA has no such device
                results.append(case.exact(inputs))
                dtypes.append(torch.float64)
            assert [result.dtype for result in results] == dtypes, case.name
            assert {result.device for result in results} == {DEVICE}, case.name
            assert {tuple(result.shape) for result in results} == {case.shape}, case.name
            last = "NHWC" in case.variant
            layout = torch.channels_last if last else torch.contiguous_format
            assert results[0].is_contiguous(memory_format=layout), case.name


def failing(inputs: Any) -> Tensor:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("broken", "what"),
    [(failing, "no such kernel"), (lambda inputs: inputs["x"] * torch.nan, "is off by None")],
    ids=["raises", "gives NaN"],
)
def test_a_kernel_that_fails_is_named_and_not_timed(
    broken: Any, what: str, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = list(kernel_cases.cases(CPU))[:2]
    bad = dataclasses.replace(good[0], variant="broken", ours=broken)
    monkeypatch.setattr(kernel_cases, "cases", lambda device: iter([bad, *good]))
    kernels.CHECK.run(context)
    assert len(context.wrong) == 1
    assert bad.name in context.wrong[0]
    assert what in context.wrong[0]
    rows = context.facts["kernels"]
    assert "ours us" not in rows[bad.name]
    assert rows[bad.name]["native us"] > 0
    assert all(rows[case.name]["ours us"] > 0 for case in good)


def test_kernels_stop_where_time_is_short(context: Context) -> None:
    context.limit_s = 0.0
    kernels.CHECK.run(context)
    names = [case.name for case in kernel_cases.cases(CPU)]
    assert context.facts["left out, no time was left"] == names
    assert "kernels" not in context.facts


def test_a_worker_compiles_the_cases_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    case = next(kernel_cases.cases(CPU))
    counted = dataclasses.replace(case, ours=lambda inputs: ran.append(case.name))
    monkeypatch.setattr(kernel_cases, "cases", lambda device: iter([counted]))
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: failing)
    with torch.no_grad():
        assert kernels.compile_cases("cpu", ["another"]) == []
        (failed,) = kernels.compile_cases("cpu", [case.name])
    assert ran == [case.name]
    assert case.name in failed


def test_network(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def ask(module: str, job: dict[str, Any], cap_s: float) -> dict[str, Any]:
        asked.append({**job, "cap_s": cap_s})
        facts = {"batch 1": {"compile": {"device_ms": 1.0}}}
        return {"facts": facts, "wrong": [f"wrong in {job['names'][-1]}"], "ended": "exit status 0"}

    monkeypatch.setattr(capped, "ask", ask)
    network.CHECK.run(context)
    # what a child found wrong is wrong here; nothing else is
    assert len(context.wrong) == len(asked) == 3
    assert [job["cap_s"] for job in asked] == [90.0, 30.0, 90.0]
    assert [job["tuned"] for job in asked] == [False, True, False]
    order = list(context.facts)
    assert order[-1] == "compile max-autotune"
    for batch in network.TINY_BATCHES:
        facts = context.facts[f"fp32 batch {batch}"]
        assert {*network.FIRST, "eager NCHW graph"} <= set(facts)
        for name in network.FIRST:
            assert facts[name]["error"] < FLOAT32
            assert min(facts[name][f"{kind}_ms"] for kind in ("device", "host", "wall")) > 0
        assert facts["ours graph"][f"{BASE} / this"] > 0
        title = f"fp32 batch {batch}: ours graph, kernels"
        kinds = set(context.facts[f"{title} by kind"])
        assert {"ours", "all"} <= kinds
        # convolutions, products and attention are ours or oneDNN's, whichever was faster here
        assert kinds <= {"all", "ours", "other", "conv", "gemm", "attention", *dict(KINDS)}
        assert context.facts[f"{title} longest"][0]["ms"] > 0
    assert context.facts["passes"]["fuse_group_norm_silu"].startswith("21 of 21")
    assert context.facts["compile reduce-overhead: batch 1"] == {"compile": {"device_ms": 1.0}}
    assert context.facts["bf16 batch 1"]["ours"]["error"] > FLOAT32


def test_a_child_of_the_network_check_answers(context: Context) -> None:
    job = {"device": "cpu", "dtype": "float32", "batches": [1], "tuned": False, "limit_s": 100.0}
    found = capped.ask(network.CHILD, {**job, "names": [BASE, "eager NCHW"]}, 100.0)
    assert (found["ended"], found["wrong"]) == ("exit status 0", [])
    assert found["facts"]["batch 1"]["eager NCHW"][f"{BASE} / this"] > 0


@torch.no_grad()
def test_a_candidate_that_fails_or_is_wrong_is_left_out(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Workload.candidate

    def some_fail(self: Workload, name: str) -> Any:
        if name == "ours":
            return lambda: self.exact() + torch.nan
        if name == "eager NHWC":
            raise RuntimeError("out of memory")
        return candidate(self, name)

    monkeypatch.setattr(Workload, "candidate", some_fail)
    work = Workload.of(context, 1, torch.float32)
    names = ["eager NCHW", "eager NHWC", "ours", BASE]
    able = network_compare.compare(context, "all", work, names, 1.0)
    assert list(able) == ["eager NCHW", BASE]
    facts = context.facts["all"]
    assert facts["eager NHWC"] == {"failed": "RuntimeError: out of memory"}
    assert facts["ours"]["error"] is None
    assert "device_ms" not in facts["ours"]
    (wrong,) = context.wrong  # a peer that fails is no fault of ours
    assert wrong.startswith("all: ours:")


@torch.no_grad()
def test_ours_is_asked_for_no_graph_where_it_would_make_one(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is captured as the others are; what it does by itself is a candidate of its own."""
    asked: list[Any] = []

    def capturing(model: Any, example: Any, *, timesteps: Any = (), graph: Any = "auto") -> Any:
        asked.append(graph)
        return optimize(model, example, timesteps=timesteps)

    monkeypatch.setattr(network_candidates, "optimize", capturing)
    work = Workload.of(context, 1, torch.float32)
    for name in ("ours", "ours graph", "ours by default"):
        assert work.candidate(name)().shape == work.x.shape
    assert asked == [None, "auto"]
    with pytest.raises(ValueError, match="name must begin with eager, ours, compile; got 'fast'"):
        work.candidate("fast")


def test_loop(context: Context) -> None:
    loop.CHECK.run(context)
    assert context.wrong == []
    for title in ("digits fp32 batch 2", "unet batch 1", "digits fp32 batch 1"):
        facts = context.facts[title]
        assert set(facts) == {PLAIN, *OURS}
        assert all(facts[name]["error"] < 1e-4 and facts[name]["images_per_s"] > 0 for name in OURS)
        assert facts["optimized step"]["equals_eager"]
        assert facts["optimized step"]["host_us_per_step"] > 0
    assert "sampler eager" not in context.facts["digits bf16 batch 2"]
    assert context.facts["digits bf16 batch 2"]["optimized step"]["error"] > 1e-4
    assert context.facts["flags"] == {"tf32": {"matmul": True, "cudnn": True}}


@torch.no_grad()
def test_the_loop_that_ours_is_compared_with_is_ddim(context: Context) -> None:
    subject = loop.digits(context, None)
    x_T = subject.x_T(2)
    exact = plain_loop(
        subject.model,
        subject.schedule,
        subject.timesteps,
        x_T,
        condition=subject.condition(2),
        method="ddim",
        prediction_type=subject.prediction_type,
        clip_sample=1.0,
    )
    assert (subject.candidate(PLAIN, 2)() - exact).norm() < FLOAT32 * exact.norm()
    with pytest.raises(ValueError, match="name must be plain eager or one of"):
        subject.candidate("fast", 1)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_apply", "ours"),
        ("_statistics", "ours"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128", "conv"),
        ("void implicit_convolve_sgemm<float, float, 1024, 5, 5>(int, int)", "conv"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16>(Params)", "gemm"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>(p)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float>(params)", "layout"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType>(x)", "layout"),
        ("Memcpy DtoD (Device -> Device)", "layout"),
        ("void at::native::vectorized_layer_norm_kernel<c10::Half, float>(int)", "norm"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<Half>(x)", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>(int)", "pointwise"),
        ("triton_poi_fused_add_mul_7", "pointwise"),
        ("something_else", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_breakdown_is_of_one_call() -> None:
    found = summary([("_apply", 600.0, 2 * CALLS), ("gemm_a", 900.0, CALLS), ("gemm_b", 300.0, 3)])
    kinds = found["by kind"]
    assert kinds["all"] == {"ms": pytest.approx(1.8 / CALLS), "kernels": 4}
    assert kinds["gemm"] == {"ms": pytest.approx(1.2 / CALLS), "kernels": 2}
    assert [kernel["kernel"] for kernel in found["longest"]] == ["gemm_a", "_apply", "gemm_b"]
    assert found["longest"][1]["count"] == 2
