"""The ops as PyTorch operators: opcheck, compile, export, modes, and the path around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from denoise_cases import HEAVY, VARIANTS, Variant, arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stepfuse.kernels import philox, registration
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.group_norm_silu import OP, GroupNormCall, group_norm_silu

OPERATORS = torch.ops.stepfuse
ABAR = torch.linspace(0.999, 0.001, 50, dtype=torch.float64)
SEED, SAMPLE, T = torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([3, 7])
SHAPE = (2, 4, 5, 3)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("variant", [VARIANTS[0], HEAVY, VARIANTS[-1]], ids=str)
def test_opcheck_denoise_step(variant: Variant) -> None:
    given = arguments(variant, SHAPE, torch.float32)
    names = ("x", "model_output", "uncond_output", "table", "step", "noise", "seed", "sample")
    inputs = tuple(given.get(name) for name in names)
    out, x0_out = torch.empty(SHAPE), torch.empty(SHAPE)
    args = (*inputs, variant.learned, "auto")
    torch.library.opcheck(OPERATORS.denoise_step_out.default, args, {"out": out, "x0_out": x0_out})
    torch.library.opcheck(OPERATORS.denoise_step_.default, (*args, None))
    graded = [
        v.clone().requires_grad_() if i in (0, 1, 2, 5) and v is not None else v
        for i, v in enumerate(inputs)
    ]
    torch.library.opcheck(
        OPERATORS.denoise_step.default, (*graded, variant.learned, variant.x0, "auto")
    )


@pytest.mark.parametrize("target", [None, "v_prediction"])
def test_opcheck_add_noise(target: str | None) -> None:
    x, eps = torch.randn(SHAPE), torch.randn(SHAPE)
    torch.library.opcheck(
        OPERATORS.add_noise.default,
        (leaf(*SHAPE), leaf(*SHAPE), T, ABAR, None, None, target, "auto"),
    )
    torch.library.opcheck(
        OPERATORS.add_noise.default, (leaf(*SHAPE), None, T, ABAR, SEED, SAMPLE, target, "auto")
    )
    drawn = (None, T, ABAR, SEED, SAMPLE, True, "auto")
    outs = {"out": torch.empty(SHAPE), "target_out": torch.empty(SHAPE) if target else None}
    torch.library.opcheck(OPERATORS.add_noise_out.default, (x, *drawn), outs)
    torch.library.opcheck(
        OPERATORS.add_noise_.default, (x, eps, T, ABAR, None, None, False, "auto", None)
    )


def test_opcheck_group_norm_silu() -> None:
    args = (leaf(*SHAPE), leaf(4), None, 2, 1e-5, leaf(2, 4), None, leaf(2, 4), True, "auto")
    torch.library.opcheck(OPERATORS.group_norm_silu.default, args)
    wanted = [True, True, False, False, False, True]
    torch.library.opcheck(OPERATORS.group_norm_silu_backward.default, (leaf(*SHAPE), *args, wanted))
    plain = tuple(v.detach() if isinstance(v, Tensor) else v for v in args)
    torch.library.opcheck(OPERATORS.group_norm_silu_out.default, plain, {"out": torch.empty(SHAPE)})
    torch.library.opcheck(OPERATORS.group_norm_silu_.default, plain)


def test_opcheck_philox() -> None:
    counters = (SEED, SAMPLE, T)
    torch.library.opcheck(
        OPERATORS.philox_normal.default, (*counters, [4, 4], torch.float32, "auto")
    )
    out = {"out": torch.empty(2, 3)}
    torch.library.opcheck(OPERATORS.philox_normal_out.default, (*counters, "auto"), out)


TABLE = torch.randn(5, 16)
TABLE[:, 10] = 7


def everything(x: Tensor, output: Tensor, step: Tensor, seed: Tensor) -> Tensor:
    """Each public op in each of its ways to return a result."""
    y, x0 = denoise_step(x, output, TABLE, step, seed=seed, learned_variance=True, return_x0=True)
    y = add_noise(y, None, 3, ABAR, seed=seed)
    y, v = add_noise(y, x0, T, ABAR, target="v_prediction")
    y = group_norm_silu(y, None, None, 2, add=v[..., 0, 0])
    buffer = torch.empty_like(y)
    denoise_step(y, output, TABLE, 1, out=buffer)
    y = y + buffer
    denoise_step(y, output, TABLE, step, inplace=True)
    add_noise(y, x0, T, ABAR, inplace=True)
    group_norm_silu(y, None, None, 4, out=y)
    return y + philox.normal(3, 0, 2, (4, 5, 3))


class Everything(torch.nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return everything(*args)


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(SHAPE), torch.randn(4, 8, 5, 3), torch.tensor([2]), SEED


def test_compiles_as_one_graph() -> None:
    """Traced by Dynamo, made functional by AOTAutograd: the same kernels, so the same bits."""
    given = inputs()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), everything(*given))


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    given = inputs()
    program = torch.export.export(Everything(), given, strict=strict)
    found = [str(node.target) for node in program.graph.nodes if "stepfuse" in str(node.target)]
    assert found == [
        f"stepfuse.{name}.default"
        for name in (
            "denoise_step", "add_noise", "add_noise", "group_norm_silu", "denoise_step_out",
            "denoise_step_", "add_noise_", "group_norm_silu_", "philox_normal",
        )
    ]  # fmt: skip
    expected = everything(*given)
    assert torch.equal(program.module()(*given), expected)
    assert torch.equal(program.run_decompositions().module()(*given), expected)


def differentiable(x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    y = group_norm_silu(x, weight, None, 2)
    y = add_noise(y, output, T, ABAR)
    return denoise_step(y, output, TABLE, 1).square().sum()


def test_gradients_of_compiled_code() -> None:
    def gradients(function: Callable[..., Tensor]) -> Sequence[Tensor]:
        torch.manual_seed(1)
        leaves = leaf(*SHAPE), leaf(*SHAPE), leaf(4)
        function(*leaves).backward()
        return [v.grad for v in leaves]

    compiled = torch.compile(differentiable, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(differentiable), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_a_recorder_sees_one_call_and_can_do_it_again() -> None:
    """Nothing else on the way, no read on the host, and the buffer among the arguments."""
    x, output, out, x0 = (torch.randn(SHAPE) for _ in range(4))
    step = torch.tensor([0])
    with Recorder() as recorder:
        denoise_step(x, output, TABLE, step, seed=SEED, sample=SAMPLE, out=out, x0_out=x0)
    ((function, args, kwargs),) = recorder.calls
    assert function is OPERATORS.denoise_step_out.default
    assert kwargs["out"] is out
    step += 3
    function(*args, **kwargs)
    expected = denoise_step(x, output, TABLE, 3, seed=SEED, sample=SAMPLE, return_x0=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(x0, expected[1])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, o: denoise_step(x, o, TABLE, T[:1], inplace=True), "denoise_step_"),
        (lambda x, o: denoise_step(x, o, TABLE, T[:1]), "denoise_step"),
        (lambda x, o: add_noise(x, None, T, ABAR, seed=SEED, sample=SAMPLE), "add_noise"),
        (lambda x, o: add_noise(x, o, T, ABAR, inplace=True), "add_noise_"),
        (lambda x, o: add_noise(x, o, T, ABAR, out=x.new_empty(0).set_(o)), "add_noise_out"),
        (lambda x, o: group_norm_silu(x, None, None, 2), "group_norm_silu"),
        (lambda x, o: group_norm_silu(x, None, None, 2, out=x), "group_norm_silu_"),
        (lambda x, o: philox.normal(SEED, SAMPLE, T, (3,)), "philox_normal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ready_arguments_make_one_operator(call: Callable[..., Any], name: str) -> None:
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    with Recorder() as recorder:
        call(x, output)
    ours = [str(function) for function, _, _ in recorder.calls if "stepfuse" in str(function)]
    assert ours == [f"stepfuse.{name}.default"]
    others = {str(function) for function, _, _ in recorder.calls} - set(ours)
    assert others <= {"aten.slice.Tensor", "aten.new_empty.default", "aten.set_.source_Tensor"}


def test_fake_cuda_tensors_need_no_gpu() -> None:
    """What the capture lint runs: shapes and devices, and no read of a tensor on the host."""
    with FakeTensorMode():
        x = torch.empty(SHAPE, device="cuda", memory_format=torch.channels_last)
        table = torch.empty(5, 16, device="cuda")
        step = torch.zeros(1, dtype=torch.int64, device="cuda")
        abar = torch.empty(50, dtype=torch.float64, device="cuda")
        results = [
            denoise_step(x, x, table, step, seed=1, backend="triton"),
            denoise_step(x, x, table, step, inplace=True),
            add_noise(x, None, torch.zeros(2, dtype=torch.int64, device="cuda"), abar, seed=1),
            group_norm_silu(x, None, None, 2),
        ]
    for y in results:
        assert y.device.type == "cuda"
        assert y.stride() == x.stride()


def test_the_direct_path_is_taken_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, output, step, seed = inputs()
    taken: list[bool] = []

    def spy(*tensors: Tensor | None) -> bool:
        taken.append(registration.eager(*tensors))
        return taken[-1]

    from stepfuse.kernels import denoise_step as module

    monkeypatch.setattr(module, "eager", spy)
    direct = denoise_step(x, output, TABLE, step, seed=seed)
    assert taken == [True]
    monkeypatch.setattr(module, "eager", lambda *tensors: False)
    assert torch.equal(denoise_step(x, output, TABLE, step, seed=seed), direct)


def test_who_makes_a_call_take_the_dispatcher() -> None:
    x = torch.randn(3)
    assert registration.eager(x, None, torch.nn.Parameter(x, requires_grad=False))
    graded = torch.nn.Parameter(x)
    assert not registration.eager(x, graded)
    with torch.no_grad():
        assert registration.eager(x, graded)
    with torch.inference_mode():
        assert registration.eager(x, graded, torch.empty(2))
    with Recorder():
        assert not registration.eager(x)
    with torch.device("cpu"):  # a function mode
        assert not registration.eager(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not registration.eager(fake)
    with torch.profiler.profile():
        assert not registration.eager(x)
    seen: list[bool] = []
    torch.func.vmap(lambda v: seen.append(registration.eager(v)) or v)(x)
    assert seen == [False]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(mode: Callable[..., Any]) -> None:
    x = leaf(*SHAPE)
    with mode():
        y = group_norm_silu(x, None, None, 2)
    assert y.requires_grad == (mode is torch.enable_grad)
    assert y.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("dispatched", [False, True])
def test_inference_tensors_take_results(dispatched: bool) -> None:
    """They have no version to raise."""
    x = torch.zeros(SHAPE)
    with torch.inference_mode(), torch.device("cpu") if dispatched else torch.no_grad():
        out = torch.full(SHAPE, torch.nan)
        denoise_step(x, x, TABLE, 0, out=out)
        add_noise(x, None, 3, ABAR, seed=1, out=out)
    assert out.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Converting a tensor")
def test_jit_trace_keeps_the_operator() -> None:
    """The tracer follows storages, which a kernel on raw pointers would escape."""
    x, other = torch.randn(2, *SHAPE)
    traced = torch.jit.trace(lambda v: group_norm_silu(v, None, None, 2), x)
    assert torch.equal(traced(other), group_norm_silu(other, None, None, 2))


@pytest.mark.parametrize("dispatched", [False, True])
def test_writing_raises_the_version(dispatched: bool) -> None:
    """Autograd refuses to use a saved tensor that one of our kernels has overwritten since."""
    x, saved = leaf(*SHAPE), torch.randn(SHAPE)
    y = (x * saved).sum()
    with torch.no_grad(), torch.device("cpu") if dispatched else torch.no_grad():
        denoise_step(torch.zeros(SHAPE), torch.zeros(SHAPE), TABLE, 0, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_autocast_leaves_dtypes_alone() -> None:
    """Arithmetic is float32 whatever the storage, so there is nothing to cast."""
    x, weight = torch.randn(SHAPE).bfloat16(), torch.ones(4)
    expected = group_norm_silu(x, weight, weight, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_norm_silu(x, weight, weight, 2)
        z = group_norm_silu(x.float(), weight, weight, 2)
    assert torch.equal(y, expected)
    assert z.dtype == torch.float32


def test_an_operator_of_something_else_has_a_namespace_of_its_own() -> None:
    made = registration.define(
        "stepfuse_tests::twice(Tensor x) -> Tensor", _twice, torch.empty_like, devices=("CPU",)
    )
    assert made is torch.ops.stepfuse_tests.twice.default
    assert torch.equal(made(torch.ones(2)), torch.full((2,), 2.0))
    known = registration.OPERATORS[made]
    assert (known.module, known.devices) == (__name__, ("CPU",))
    assert known.direct is None
    assert known.blank is None
    kernels = [
        torch._C._dispatch_has_kernel_for_dispatch_key(made.name(), key) for key in ("CPU", "CUDA")
    ]
    assert kernels == [True, False]


def _twice(x: Tensor) -> Tensor:
    return 2 * x


def test_a_call_names_the_arguments_of_the_schema() -> None:
    names = [field.name for field in fields(GroupNormCall)]
    assert [argument.name for argument in OP._schema.arguments] == names
    x = torch.randn(SHAPE)
    call = GroupNormCall(x, torch.ones(4), None, 2, shift=torch.ones(2, 4))
    assert GroupNormCall.of(call.arguments()) == call
    expected = group_norm_silu(x, torch.ones(4), None, 2, shift=torch.ones(2, 4))
    assert torch.equal(OP(*call.arguments()), expected)
