"""Would this step be captured by a CUDA graph? Answered without a GPU.

The step runs on fake tensors that say they are on "cuda": shapes and devices are real, data is not.
What would break a capture, or freeze a value into it, is reported with the line that did it.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.replay.capture import CaptureRefused, calling_line, origin, refuse_host_reads
from stepfuse.engine.sampling import no_autograd
from stepfuse.engine.sampling.condition import Staged, check_condition
from stepfuse.engine.sampling.denoiser import Condition, Denoiser
from stepfuse.engine.sampling.program import Layout, Program
from stepfuse.engine.sampling.request import replacement
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.uncapturable import modules_in, refusal
from stepfuse.kernels import torch_names
from stepfuse.kernels.arguments import as_sizes, check_kind
from stepfuse.kernels.memory import history_dtype
from stepfuse.kernels.torch_names import (
    FakeTensor,
    FakeTensorMode,
    FunctionalTensor,
    TorchDispatchMode,
    tree_leaves,
    tree_map_only,
)

_DEVICE = torch.device("cuda", 0)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that a capture would not survive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.problems: list[str] = []
        self._made: list[tuple[weakref.ref[Tensor], str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        refuse_host_reads(func, args)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        made = [out for out in tree_leaves(result) if isinstance(out, Tensor)]
        kinds = {tensor.device.type for tensor in (*read, *made)}
        if {"cpu", "cuda"} <= kinds:
            reason = "copies between the host and the device" if made else "reads a CPU tensor"
            if any(tensor.device.type == "cpu" for tensor in read):
                reason = "has a CPU operand, whose value a capture would freeze"
            self.problems.append(f"{func} {reason}, {calling_line()}")
        known = {id(tensor) for tensor in read}
        for out in made:
            if id(out) not in known:
                self._made.append((weakref.ref(out), f"made by {func}, {calling_line()}"))
        return result

    def outliving(self) -> list[str]:
        """Tensors the step made that are still held by somebody."""
        gc.collect()
        return [
            f"a tensor outlives the step: {where}" for ref, where in self._made if ref() is not None
        ]


def check_capturable(
    sampler: Sampler, shape: Sequence[int], condition: Condition | None = None
) -> None:
    """Run one step of ``sampler`` for ``shape`` as it would run on CUDA, and look at it.

    Raises TypeError or ValueError for arguments that `Sampler.sample` does not take, and
    `CaptureRefused` with one line for each host sync, CPU operand and allocation that outlives the
    step, and where the model calls autograd, which cannot be looked at here.
    """
    check_kind("sampler", sampler, Sampler, "a Sampler")
    shape = as_sizes("shape", shape)
    if len(shape) < 2:
        raise ValueError(f"shape must be (N, C, ...); got {shape}")
    problems: list[str] = []
    conditions = _conditions(sampler, shape[0], condition)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _check_model(sampler, fake)
    moved = _beside_the_model(sampler)
    steering = sampler.steering
    if steering is not None and steering.uncapturable:
        problems.append(steering.uncapturable)
    measured = None
    if steering is not None:
        measured = steering.measured_shape(shape, history_dtype(sampler.dtype), sampler.device)
    with torch.no_grad(), fake, without_bindings(), no_autograd.no_autograd(), _on_cuda(moved):
        program = _fake_program(sampler, tuple(shape), conditions, measured)
        for guided in sorted(set(sampler.plan.guided)):
            try:
                program.advance(guided)  # what is made once and kept is not growth
                with _Watch() as watch:
                    program.advance(guided)
            except CaptureRefused as reason:
                problems.append(str(reason))
            except Exception as error:
                problems.append(f"{type(error).__name__}: {_first_line(error)}, {origin(error)}")
            else:
                problems += [*watch.problems, *watch.outliving()]
    if problems:
        raise CaptureRefused("\n".join(problems))


def _check_model(sampler: Sampler, fake: FakeTensorMode) -> None:
    """Raise `CaptureRefused` where the model says so, as it would on CUDA."""
    module = sampler.denoiser.module
    with fake, _on_cuda([] if module is None else list(module.modules())):
        reason = refusal(sampler.denoiser.model)
    if reason:
        raise CaptureRefused(reason)


def _beside_the_model(sampler: Sampler) -> list[nn.Module]:
    """Modules of the guidance, and of a model that is a function, which lie where the sampler does.

    On CUDA they would lie there; one somewhere else is a mistake that has to show.
    """
    steering, denoiser = sampler.steering, sampler.denoiser
    found = [] if steering is None else steering.modules()
    if denoiser.module is None:
        found += modules_in((denoiser.model,))

    def is_there(module: nn.Module) -> bool:
        tensors = (*module.parameters(), *module.buffers())
        return all(tensor.device == sampler.device for tensor in tensors)

    return [module for module in found if is_there(module)]


@contextmanager
def _on_cuda(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, under a fake mode, the modules hold fake CUDA tensors in the place of their own."""
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, name, tensor)
        for module in modules
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]
    try:
        for held, name, tensor in places:
            fake = _fake(tensor)
            is_weight = isinstance(tensor, nn.Parameter)
            held[name] = nn.Parameter(fake, requires_grad=False) if is_weight else fake
        yield
    finally:
        for held, name, tensor in places:
            held[name] = tensor


def _conditions(sampler: Sampler, count: int, condition: Condition | None) -> tuple[Any, Any]:
    """The condition and what makes it the unconditional one, as the sampler would take them."""
    checked = check_condition(condition, count, sampler.device)
    return checked, replacement(checked, sampler.steering, count, sampler.device)


def _fake_program(
    sampler: Sampler,
    shape: tuple[int, ...],
    conditions: tuple[Any, Any],
    measured: tuple[int, ...] | None = None,
) -> Program:
    """The sampler's program on fake CUDA buffers, its model on fake CUDA weights."""
    plan, guidance = sampler.plan, sampler.steering
    layout = Layout(
        *(shape, sampler.dtype, _DEVICE, False, False, False, ()),
        slots=plan.slots,
        whole=plan.whole,
        measured=measured,
    )
    return Program(
        _FakeDenoiser(sampler.denoiser),
        # autograd aborts on fake CUDA tensors
        None if guidance is None else guidance.without_autograd(),
        layout,
        Staged(*tree_map_only(Tensor, _fake, conditions)),
        capacity=sampler.schedule.num_train_timesteps,
        learned_variance=sampler.update.uses_learned_variance,
        mean_guidance=sampler.mean_guidance,
        backend="auto",
    )


@contextmanager
def without_bindings() -> Iterator[None]:
    """Inside, methods whose Python binding asks for a CUDA build are said in operators instead.

    For tensors on CUDA, wherever they are called: in the model, in decompositions, by an exporter.
    """
    places = [(cls, binding) for binding in _OPERATORS for cls in _classes(binding)]
    before = [(cls, b.__name__, vars(cls).get(b.__name__)) for cls, b in places]
    try:
        for cls, binding in places:
            setattr(cls, binding.__name__, _method(_OPERATORS[binding], binding))
        yield
    finally:
        for cls, name, method in before:
            if method is None:
                delattr(cls, name)  # it was inherited
            else:
                setattr(cls, name, method)


def _classes(binding: Callable[..., Any]) -> tuple[type[Tensor], ...]:
    """Where a method is exchanged.

    A class that had an indexing method of its own counts as a sequence ever after, though the
    method is gone, and ``torch.tensor([x])`` asks a sequence for its length: not for `Tensor`.
    """
    indexing = (Tensor.__getitem__, Tensor.__setitem__)
    return (FakeTensor, FunctionalTensor) if binding in indexing else (Tensor,)


def _method(operator: Callable[..., Any], binding: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = operator if self.device.type == "cuda" else binding
        return run(self, *args, **kwargs)

    return method


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return (
        x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)
    )


def _to(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    device, dtype, _, memory_format = torch_names.parse_to(*args, **kwargs)
    device, dtype = device or x.device, dtype or x.dtype
    if not copy and (device.type, dtype) == (x.device.type, x.dtype):
        return x if memory_format is None else _contiguous(x, memory_format)
    return _operator("_to_copy")(x, device=device, dtype=dtype, memory_format=memory_format)


def _set_item(x: Tensor, index: Any, value: Any) -> None:
    _operator("copy_")(_indexed(x, index), torch.as_tensor(value, dtype=x.dtype, device=x.device))


def _read_on_host(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise CaptureRefused(f"a tensor's values are read on the host, {calling_line()}")


def _operator(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(torch.ops.aten, name).default
    return found


def _indexed(x: Tensor, index: Any) -> Tensor:
    entries = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [e for e in entries if not isinstance(e, Tensor)]:
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        named = sum(e is not None for e in entries) - 1
        entries[at : at + 1] = [slice(None)] * (x.dim() - named)
    dim, advanced = 0, {}
    for entry in entries:
        if entry is None:
            x = x.unsqueeze(dim)
        elif isinstance(entry, slice):
            if entry != slice(None):
                x = torch.ops.aten.slice.Tensor(x, dim, entry.start, entry.stop, entry.step or 1)
        elif isinstance(entry, int):
            x = x.select(dim, entry)
            continue
        else:
            advanced[dim] = torch.as_tensor(entry)
        dim += 1
    if advanced:
        indices = [advanced.get(i) for i in range(max(advanced) + 1)]
        refuse_host_reads(torch.ops.aten.index.Tensor, (x, indices))
        x = torch.ops.aten.index.Tensor(x, indices)
    return x


_HOST_READS = (
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.cpu,
    Tensor.item,
    Tensor.numpy,
    Tensor.tolist,
)
_OPERATORS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: _set_item,
    Tensor.contiguous: _contiguous,
    Tensor.copy_: _operator("copy_"),
    Tensor.nonzero: _operator("nonzero"),
    Tensor.to: _to,
    **dict.fromkeys(_HOST_READS, _read_on_host),
    Tensor.cuda: lambda x, *args, **kwargs: _to(x, _DEVICE),
}


class _FakeDenoiser(Denoiser):
    """The same model, its weights and buffers replaced by fake ones on CUDA."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.model)
        self.takes_batch = denoiser.takes_batch  # type: ignore[method-assign]
        if self.module is None:
            return
        module = copy.copy(self.module)  # an optimised model compiles for fake CUDA tensors apart
        fakes = {name: _fake(buffer) for name, buffer in module.named_buffers()}
        for name, weight in module.named_parameters():
            fakes[name] = nn.Parameter(_fake(weight), requires_grad=False)

        def call(x: Tensor, t: Tensor, **condition: Any) -> Any:
            return torch.func.functional_call(module, fakes, (x, t), condition)

        self.model = call


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_DEVICE, requires_grad=False
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
