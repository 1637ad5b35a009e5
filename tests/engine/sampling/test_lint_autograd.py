"""Models that call autograd: refused by name, where PyTorch without CUDA would end the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import stepfuse as sf
from stepfuse.engine.replay.capture import CaptureRefused
from stepfuse.engine.sampling.lint import check_capturable

ROOT = Path(__file__).parents[3]
Model = Callable[[Tensor, Tensor], Tensor]


def energy(x: Tensor) -> Tensor:
    return x.square().sum()


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(True)


def grad(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        y = leaf(x)
        return torch.autograd.grad(energy(y), y)[0]


def backward(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        y = leaf(x)
        energy(y).backward()
    assert y.grad is not None
    return y.grad


def switched(x: Tensor, t: Tensor) -> Tensor:
    torch.set_grad_enabled(True)
    try:
        return grad(x, t)
    finally:
        torch.set_grad_enabled(False)


@torch.inference_mode(False)
def not_inference(x: Tensor, t: Tensor) -> Tensor:
    return energy(leaf(x)) * x


def func_grad(x: Tensor, t: Tensor) -> Tensor:
    return torch.func.grad(energy)(x)


def func_vjp(x: Tensor, t: Tensor) -> Tensor:
    out, vjp = torch.func.vjp(torch.square, x)
    return vjp(out)[0]


def func_jacrev(x: Tensor, t: Tensor) -> Tensor:
    return torch.func.jacrev(energy)(x)


def functional_vjp(x: Tensor, t: Tensor) -> Tensor:
    return torch.autograd.functional.vjp(energy, x)[1]


def functional_jvp(x: Tensor, t: Tensor) -> Tensor:
    return torch.autograd.functional.jvp(torch.square, x, x)[1]


def hooked(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        y = leaf(x) * 2
        y.register_hook(lambda gradient: gradient * 2)
        return y.detach()


def checkpointed(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        y = leaf(x)
        return torch.autograd.grad(checkpoint(torch.square, y, use_reentrant=False).sum(), y)[0]


def reentrant(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        return checkpoint(torch.square, leaf(x), use_reentrant=True).detach()


def weighted(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        return (x * torch.ones((), device=x.device, requires_grad=True)).detach()


class Squared(torch.autograd.Function):
    """With a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def own_backward(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        y = leaf(x)
        return torch.autograd.grad(energy(Squared.apply(y)), y)[0]


@torch.set_grad_enabled(True)
def decorated(x: Tensor, t: Tensor) -> Tensor:
    return grad(x, t)


def made_inside(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        return (nn.Parameter(torch.ones((), device=x.device)) * x).detach()


def each_sample(x: Tensor, t: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(energy))(x)


def dual(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad(), forward_ad.dual_level():
        y = forward_ad.make_dual(leaf(x), torch.ones_like(x))
        return (y * y).detach()


def written(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        return torch.zeros_like(x).copy_(leaf(x)).detach()


def without_function_modes(x: Tensor, t: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        y = leaf(x)
        energy(y).backward()
    assert y.grad is not None
    return y.grad


def compiled(x: Tensor, t: Tensor) -> Tensor:
    gradient: Tensor = torch.compile(torch.func.grad(energy), backend="eager")(x)
    return gradient


def in_a_thread(x: Tensor, t: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(grad(x, t)))
    thread.start()
    thread.join()
    return found[0]


REFUSED: list[Model] = [
    grad,
    backward,
    switched,
    not_inference,
    func_grad,
    func_vjp,
    func_jacrev,
    functional_vjp,
    functional_jvp,
    hooked,
    checkpointed,
    reentrant,
    weighted,
    own_backward,
    decorated,
    made_inside,
    each_sample,
    dual,
    written,
    without_function_modes,
    compiled,
]


def enabled(x: Tensor, t: Tensor) -> Tensor:
    """Nothing requires a gradient, so that none is recorded."""
    with torch.enable_grad():
        return x * 2


def forward_mode(x: Tensor, t: Tensor) -> Tensor:
    return torch.func.jvp(torch.square, (x,), (x,))[1]


def vectorised(x: Tensor, t: Tensor) -> Tensor:
    return torch.func.vmap(torch.square)(x)


def reason(model: Model) -> str:
    """Why the model's step is refused; empty where it is not."""
    try:
        check_capturable(sf.Sampler(model, sf.Schedule.linear()), (2, 1, 4, 4))
    except CaptureRefused as refused:
        return str(refused)
    return ""


def in_another_process(model: Model) -> subprocess.CompletedProcess[str]:
    code = (
        "import json; from tests.engine.sampling import test_lint_autograd as models; "
        f"print(json.dumps(models.reason(models.{model.__name__})))"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


@pytest.mark.parametrize(
    "model", [grad, func_grad, own_backward, without_function_modes, compiled, in_a_thread]
)
def test_the_process_lives(model: Model) -> None:
    done = in_another_process(model)
    assert done.returncode == 0, done.stderr[-2000:]
    said = "a thread is started" if model is in_a_thread else "autograd runs"
    assert f"{said} inside the step" in json.loads(done.stdout)


@pytest.mark.parametrize("model", REFUSED)
def test_a_model_that_calls_autograd_is_refused_with_its_line(model: Model) -> None:
    found = reason(model)
    assert found.startswith("autograd runs inside the step")
    assert f"at {__file__}:" in found


def own_forward(x: Tensor, t: Tensor) -> Tensor:
    squared: Tensor = Squared.apply(x)
    return squared


@pytest.mark.parametrize("model", [enabled, forward_mode, vectorised, own_forward])
def test_what_records_nothing_passes(model: Model) -> None:
    assert reason(model) == ""


def test_gradients_are_as_before_afterwards() -> None:
    for before in (True, False):
        with torch.set_grad_enabled(before):
            assert reason(switched)
            assert torch.is_grad_enabled() is before
    y = leaf(torch.ones(2))
    assert torch.autograd.grad(energy(y), y)[0].tolist() == [2, 2]


def test_threads_modes_and_the_compiler_are_as_before_afterwards() -> None:
    start, switch = threading.Thread.start, torch._C.DisableTorchFunction
    assert reason(in_a_thread)
    assert reason(without_function_modes)
    assert (threading.Thread.start, torch._C.DisableTorchFunction) == (start, switch)
    other = threading.Thread(target=lambda: None)
    other.start()
    other.join()
    counter = torch._dynamo.testing.CompileCounter()
    twice = torch.compile(lambda x: x * 2, backend=counter)
    assert twice(torch.ones(3)).tolist() == [2, 2, 2]
    assert counter.frame_count == 1
