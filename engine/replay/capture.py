"""Turn one sampler step into something that can be replayed without running its Python.

On CUDA that is a CUDA graph (`cuda_graph`). On the CPU it is a `Recording`: the operations of one
step, taken down below the modules and autograd, called again on the same buffers. Both freeze
whatever the step decided in Python, so that a mistake in a captured step shows on a machine without
a GPU too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from stepfuse.engine.compile.weights.parked import home
from stepfuse.engine.replay import watching_mode
from stepfuse.engine.replay.watching_mode import WatchingMode
from stepfuse.engine.replay.workspace import Workspace
from stepfuse.engine.replay.writer import Writer
from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import tree_leaves

# frames that are not the reader's
_QUIET = (
    str(Path(torch.__file__).parent),
    __file__,
    watching_mode.__file__,
    str(Path(__file__).parent.with_name("sampling") / "lint.py"),
    str(Path(__file__).parent.with_name("sampling") / "no_autograd.py"),
    str(Path(__file__).with_name("cuda_graph.py")),
)
_HOST_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

Step = Callable[[], None]


class CaptureRefused(RuntimeError):
    """The step cannot be captured; the message names the operation and its line."""


class Captured(Protocol):
    """A step that can be done again on the buffers it was captured on."""

    def replay(self) -> None:
        """Do it once."""

    def holds(self) -> bool:
        """Whether the tensors that it reads still lie where they lay."""


class TensorsRead:
    """Tensors that a step was given, of every kind, and where each plain one lies.

    A captured step goes on reading there: the views and the addresses that it keeps do not follow a
    tensor to other memory (``weight.data = ...``). The tensors are held.
    """

    def __init__(self) -> None:
        # by id, which nothing else can have while they are held; None for packed ones
        self._found: dict[int, tuple[Tensor, int | None]] = {}

    def add(self, tensor: Tensor) -> None:
        """One that existed before the step."""
        if id(tensor) not in self._found:
            plain = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
            self._found[id(tensor)] = tensor, home(tensor) if plain else None

    @property
    def tensors(self) -> list[Tensor]:
        """They."""
        return [tensor for tensor, _ in self._found.values()]

    def holds(self) -> bool:
        """Whether all are where they were; one that was parked counts as where it was before."""
        return all(at is None or home(tensor) == at for tensor, at in self._found.values())


class Recording(WatchingMode):
    """The operations of one run of ``step``, written out as one Python function and compiled.

    Tensors that existed before the step (buffers, weights) are bound by reference, so that writing
    to them takes effect; views of those are taken once. Values made on the way are local variables,
    dropped after their last use; results of operators that can be told where to put them lie in one
    memory, which the recording keeps (`MemoryPlan`). Recording runs the step once.

    Raises `CaptureRefused` for an operation whose result Python could branch on.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = WeakIdKeyDictionary()  # tensor made while recording -> its variable
        self._made = 0
        self._writer = Writer({}, self._name_of)
        self.read = TensorsRead()
        with NoCopies(), self:
            step()
        self.replay: Step = self._writer.function(
            "replay", "<recorded step>", memory=Workspace()
        )
        self.operations = len(self._writer.lines)
        del self._names, self._writer

    def holds(self) -> bool:
        """Whether the tensors that it reads still lie where they lay."""
        return self.read.holds()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        refuse_host_reads(func, args)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reads = []
        for leaf in read:
            name = self._name_of(leaf)
            if name is None:
                self.read.add(leaf)
            else:
                reads.append(name)
        result = func(*args, **kwargs)
        if read and not reads and func.is_view and _is_view_of(result, read):
            return result  # a view of a buffer or a weight stays what it is
        before = {id(leaf) for leaf in read}
        made = [
            out for out in tree_leaves(result) if isinstance(out, Tensor) and id(out) not in before
        ]
        makes = [self._name(out) for out in made]
        target = makes[0] if makes else ""
        if makes and isinstance(result, (tuple, list)):
            target = ", ".join(self._name_of(out) or "_" for out in result) + ","
        self._writer.call(
            func, args, kwargs, reads=reads, makes=makes, target=target, result=result
        )
        return result

    def _name(self, out: Tensor) -> str:
        name = self._names[out] = f"v{self._made}"
        self._made += 1
        return name

    def _name_of(self, value: Any) -> str | None:
        """The variable of a tensor made while recording, as long as that lives."""
        if not isinstance(value, Tensor) or value not in self._names:
            return None
        return str(self._names[value])


def _is_view_of(result: Any, read: Sequence[Tensor]) -> bool:
    """Whether all of a result lies in what was read: under inference mode, operators that may copy
    (`to`, `reshape`, `contiguous`) come here as views whichever they do.
    """
    alias: Any = torch_names.is_alias_of
    made = [out for out in tree_leaves(result) if isinstance(out, Tensor)]
    return all(any(alias(out, source) for source in read) for out in made)


class NoCopies(TorchFunctionMode):
    """Refuses what copies a tensor to Python without an operator: a replay would keep the copy."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _COPIES and not _compiling():
            name = getattr(func, "__name__", func)
            raise CaptureRefused(f"{name}() copies a tensor to the host, {calling_line()}")
        return func(*args, **(kwargs or {}))


_COPIES = (Tensor.numpy, Tensor.tolist, Tensor.__array__)
_COMPILER = str(Path(__file__).resolve().parent.parent / "compile")


def _compiling() -> bool:
    """Whether an optimised model is being compiled, which looks at weights and not at the step."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if os.path.realpath(frame.f_code.co_filename).startswith(_COMPILER):
            return True
        frame = frame.f_back
    return False


class Reading(WatchingMode):
    """Collects in ``read`` the tensors that are read in its ``with`` block and existed before.

    ``made`` has those made inside, as long as they live.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = TensorsRead()
        self.made = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf not in self.made:
                self.read.add(leaf)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.made[leaf] = True
        return result


def refuse_host_reads(func: Any, args: Sequence[Any]) -> None:
    """Raise `CaptureRefused` where ``func`` gives Python something to branch on."""
    if func is torch.ops.aten.index.Tensor:
        # the shape of x[i] depends on the values of i only where i is a mask
        reads = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    else:
        reads = any(tag in func.tags for tag in _HOST_READS)
    if reads:
        raise CaptureRefused(f"{func} reads a tensor's values on the host, {calling_line()}")


def calling_line() -> str:
    """Where the running operation was asked for: the last line outside PyTorch and this file."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_QUIET):
            return f"at {frame.filename}:{frame.lineno}: {frame.line}"
    return "at an unknown line"


def origin(error: BaseException) -> str:
    """The deepest line of an error's traceback outside PyTorch and this file."""
    where = "at an unknown line"
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(_QUIET):
            where = f"at {frame.filename}:{frame.lineno}: {frame.line}"
    return where


def check_replay(
    captured: Captured, step: Step, state: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """Do the same step eagerly and by replay from one state, and compare ``outputs`` bitwise.

    Finds what the dispatcher does not show: values copied to NumPy or lists, branches on Python
    state, operations that are not repeatable. ``state`` is put back before each of the two.

    On CUDA some kernels add in the order in which threads arrive: see `as_repeatable`.

    Raises `CaptureRefused` where they differ.
    """
    device = state[0].device
    with untouched(state):
        saved = [s.clone() for s in state]

        def results(run: Step) -> list[Tensor]:
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)
            with _seeded(device):
                run()
            return [out.nan_to_num() for out in outputs]

        eager, replayed = results(step), results(captured.replay)
        if all(map(torch.equal, eager, replayed)):
            return
        if device.type != "cpu" and as_repeatable(eager, results(step), replayed):
            return
    raise CaptureRefused(
        "a replay differs from the eager step: the model depends on something that is "
        "decided in Python (a branch, a NumPy value, a counter), or is not repeatable"
    )


_ROUNDING = 1e-2  # of what is computed: more than sums in another order make, in bfloat16 too
_SEVERAL = 8


def as_repeatable(
    eager: Sequence[Tensor], again: Sequence[Tensor], other: Sequence[Tensor]
) -> bool:
    """Whether ``other`` differs from an eager step by several times what another eager step does at
    most, and that by no more than rounding. A branch that was frozen makes more.
    """
    size, spread = (
        _distance(eager, [torch.zeros_like(out) for out in eager]),
        _distance(eager, again),
    )
    return spread <= _ROUNDING * size and _distance(eager, other) <= _SEVERAL * spread


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Euclidean, of all tensors together."""
    parts = [(x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=True)]
    return float(torch.stack(parts).sum().sqrt())


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Inside, random numbers of the CPU and of ``device`` begin anew; no other device is touched,
    as ``torch.manual_seed`` would.
    """
    on_cuda = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_cuda):
        torch.default_generator.manual_seed(0)
        for index in on_cuda:
            torch.cuda.default_generators[index].manual_seed(0)
        yield


@contextmanager
def untouched(state: Sequence[Tensor]) -> Iterator[None]:
    """Put the tensors back as they were on leaving."""
    saved = [s.clone() for s in state]
    try:
        yield
    finally:
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
