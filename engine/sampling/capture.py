"""Turn one sampler step into something that can be replayed without running its Python.

On CUDA that is a CUDA graph. On the CPU it is a `Recording`: the operations of one step, taken down
below the modules and autograd, called again on the same buffers. Both freeze whatever the step
decided in Python, so that a mistake in a captured step shows on a machine without a GPU too.
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
from stepfuse.engine.replay.writer import Writer
from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import tree_leaves

# frames that are not the reader's
_QUIET = (
    str(Path(torch.__file__).parent),
    __file__,
    watching_mode.__file__,
    str(Path(__file__).with_name("lint.py")),
    str(Path(__file__).with_name("no_autograd.py")),
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
    """Tensors that a step was given, and where each of them lies.

    A captured step goes on reading there: the views and the addresses that it keeps do not follow a
    tensor to other memory (``weight.data = ...``).
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, int]] = {}  # by id; held, so that no id is used twice

    def add(self, tensor: Tensor) -> None:
        """One that existed before the step."""
        plain = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
        if plain and id(tensor) not in self._found:
            self._found[id(tensor)] = tensor, home(tensor)

    @property
    def tensors(self) -> list[Tensor]:
        """They."""
        return [tensor for tensor, _ in self._found.values()]

    def holds(self) -> bool:
        """Whether all are where they were; one that was parked counts as where it was before."""
        return all(home(tensor) == address for tensor, address in self._found.values())


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
        self._names: dict[int, str] = {}  # id of a tensor made while recording -> its variable
        self._alive: list[Tensor] = []  # so that no such id is used twice
        self._writer = Writer({}, lambda value: self._names.get(id(value)))
        self.read = TensorsRead()
        with _NoCopies(), self:
            step()
        self.replay: Step = self._writer.function("replay", "<recorded step>", memory="own")
        self.operations = len(self._writer.lines)
        del self._names, self._alive, self._writer

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
            if id(leaf) in self._names:
                reads.append(self._names[id(leaf)])
            else:
                self.read.add(leaf)
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
            target = ", ".join(self._names.get(id(out), "_") for out in result) + ","
        self._writer.call(
            func, args, kwargs, reads=reads, makes=makes, target=target, result=result
        )
        return result

    def _name(self, out: Tensor) -> str:
        name = f"v{len(self._alive)}"
        self._names[id(out)] = name
        self._alive.append(out)
        return name


def _is_view_of(result: Any, read: Sequence[Tensor]) -> bool:
    """Whether all of a result lies in what was read: under inference mode, operators that may copy
    (`to`, `reshape`, `contiguous`) come here as views whichever they do.
    """
    alias: Any = torch_names.is_alias_of
    made = [out for out in tree_leaves(result) if isinstance(out, Tensor)]
    return all(any(alias(out, source) for source in read) for out in made)


class CudaGraph:
    """``step``, done ``repeat`` times in one CUDA graph; warmed up on a side stream first.

    The graphs of one sampler share a memory pool. Capturing does not run the step's kernels, the
    warm-up does.
    """

    def __init__(self, step: Step, repeat: int = 1, pool: Any = None) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        reading = Reading()
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
            with reading:
                step()
        self.holds = reading.read.holds
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, pool=pool):
                for _ in range(repeat):
                    step()
        except RuntimeError as error:
            raise CaptureRefused(f"the CUDA graph could not be captured: {error}") from error

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self.graph.replay()


class _NoCopies(TorchFunctionMode):
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
    """Collects in ``read`` the tensors that are read in its ``with`` block and existed before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = TensorsRead()
        self._made = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf not in self._made:
                self.read.add(leaf)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._made[leaf] = True
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


def check_replay(
    captured: Captured, step: Step, state: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """Do the same step eagerly and by replay from one state, and compare ``outputs`` bitwise.

    Finds what the dispatcher does not show: values copied to NumPy or lists, branches on Python
    state, operations that are not repeatable. ``state`` is put back before each of the two.

    Raises `CaptureRefused` where they differ.
    """
    results = []
    with untouched(state):
        saved = [s.clone() for s in state]
        for run in (step, captured.replay):
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                run()
            results.append([out.clone() for out in outputs])
    for eager, replayed in zip(*results, strict=True):
        if not torch.equal(eager.nan_to_num(), replayed.nan_to_num()):
            raise CaptureRefused(
                "a replay differs from the eager step: the model depends on something that is "
                "decided in Python (a branch, a NumPy value, a counter), or is not repeatable"
            )


@contextmanager
def untouched(state: Sequence[Tensor]) -> Iterator[None]:
    """Put the tensors back as they were on leaving."""
    saved = [s.clone() for s in state]
    try:
        yield
    finally:
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
