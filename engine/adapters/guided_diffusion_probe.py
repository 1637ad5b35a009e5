"""Whether an object's steps are those that are replaced: one of each, on a few numbers."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_STEPS = ("p_sample", "ddim_sample", "ddim_reverse_sample")
_LOOPS = ("p_sample", "ddim_sample")
_BOTH_NEED = {"self", "model", "clip_denoised", "denoised_fn", "model_kwargs"}
_STEP_NEEDS = _BOTH_NEED | {"x", "t"}
_LOOP_NEEDS = _BOTH_NEED | {"shape", "noise", "device", "progress"}
_OPTIONAL = {"cond_fn", "eta"}
_SHAPE = (2, 2, 3, 5)
_LOOPED = 3  # timesteps of a loop
_NEAR = 1e-4  # of the largest number: float32 here, float32 coefficients there


def agreeing(obj: Any, make: Callable[[Any], Any]) -> tuple[list[str], dict[str, str]]:
    """The methods of ``obj`` that do what those of ``make(obj)`` do, and why the others do not.

    A method without ``cond_fn`` is not called with one; one that does something else with it is
    named "<method> with cond_fn". The generator's state is left as it was.
    """
    names: list[str] = []
    reasons: dict[str, str] = {}
    fast, short = make(obj), copy.copy(obj)
    short.num_timesteps = min(_LOOPED, obj.num_timesteps)  # where a loop starts
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name in _STEPS:
            if not hasattr(obj, name):
                continue
            reason = _signature_problem(obj, name, _STEP_NEEDS)
            for case in [] if reason else _cases(obj, fast, name):
                reason = reason or _difference(obj, fast, name, case)
            if reason:
                reasons[name] = reason
                continue
            names.append(name)
            if "cond_fn" in signature(obj, name).parameters:
                for case in _cases(obj, fast, name):
                    difference = _difference(obj, fast, name, {**case, "cond_fn": _gradient})
                    if difference:
                        reasons[f"{name} with cond_fn"] = difference
            for loop in (f"{name}_loop", f"{name}_loop_progressive") if name in _LOOPS else ():
                arguments = {"model": _model(fast), "shape": _SHAPE, "device": "cpu"}
                reason = _signature_problem(obj, loop, _LOOP_NEEDS) or _difference(
                    short, make(short), loop, arguments
                )
                if reason:
                    reasons[loop] = reason
                else:
                    names.append(loop)
        t = torch.tensor([0, obj.num_timesteps - 1], device="cpu")
        x = torch.randn(_SHAPE, device="cpu")
        reason = _difference(obj, fast, "q_sample", {"x_start": x, "t": t})
        if reason:
            reasons["q_sample"] = reason
        else:
            names.append("q_sample")
    return names, reasons


def signature(obj: Any, name: str) -> inspect.Signature:
    """The parameters of a method of the object's class, ``self`` first."""
    return _signature(getattr(type(obj), name))


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _signature_problem(obj: Any, name: str, needed: set[str]) -> str:
    """Why a method cannot be one that is known; empty where it can."""
    if not hasattr(type(obj), name):
        return "its class has none"
    found = set(signature(obj, name).parameters)
    for parameter in sorted(found - needed - _OPTIONAL):
        return f"it takes {parameter!r}, which guided-diffusion's does not"
    for parameter in sorted(needed - found):
        return f"it does not take {parameter!r}, which guided-diffusion's does"
    return ""


def _cases(obj: Any, fast: Any, name: str) -> Iterator[dict[str, Any]]:
    """Arguments at the ends and the middle of the schedule, clipped and not."""
    x, last = torch.randn(_SHAPE, device="cpu"), obj.num_timesteps - 1
    etas: list[dict[str, Any]] = [{}] if name != "ddim_sample" else [{}, {"eta": 0.5}]
    # at the last timestep, the way up ends at abar = 0 and the first x0 may be divided by 0
    for i in sorted({0, min(1, last), last // 2, max(last - 1, 0)}):
        for clip in (True, False):
            for eta in etas:
                t = torch.full((_SHAPE[0],), i, device="cpu")
                given = {"model": _model(fast), "x": x, "t": t, "model_kwargs": {}}
                yield {**given, "clip_denoised": clip, **eta}


def _difference(obj: Any, fast: Any, name: str, arguments: dict[str, Any]) -> str:
    """How a method's results differ from ours; empty where they do not."""
    try:
        theirs = _run(lambda: getattr(obj, name)(**arguments))
    except Exception as error:
        return f"it fails on a small example: {type(error).__name__}: {error}"
    ours = _run(lambda: getattr(fast, name)(**arguments))
    if ours.shape != theirs.shape:
        return "its results are not those of guided-diffusion's: other names or shapes"
    bound = _NEAR * (1 + float(theirs.nan_to_num(0, 0, 0).abs().max()))
    if torch.allclose(ours.to(theirs), theirs, rtol=0, atol=bound, equal_nan=True):
        return ""
    worst = float((ours - theirs).abs().max())
    return f"its results are not those of guided-diffusion's: they differ by {worst:.3g}"


def _run(call: Callable[[], Any]) -> Tensor:
    torch.default_generator.manual_seed(1)  # of the CPU alone
    result = call()
    if isinstance(result, Tensor):
        return result
    results = [result] if isinstance(result, dict) else list(result)
    if not all({"sample", "pred_xstart"} <= set(each) for each in results):
        return torch.empty(0)
    return torch.stack([each[name] for each in results for name in ("sample", "pred_xstart")])


def _model(fast: Any) -> Callable[..., Tensor]:
    """An elementwise function of x and t, with a variance half where one is learned."""

    def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        shift = torch.sin(t.to(x.dtype)).view(-1, *[1] * (x.dim() - 1))
        out = torch.sin(2 * x + shift)
        return torch.cat([out, 0.7 * out.flip(0)], dim=1) if fast.rows.learned else out

    return model


def _gradient(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return torch.cos(3 * x + torch.sin(t.to(x.dtype)).view(-1, *[1] * (x.dim() - 1)))
