"""The forward of an accelerated model of diffusers, which runs compiled networks.

    unet(x, t, encoder_hidden_states, ...)
      ├─ what a compiled network takes ──► `Optimized`, one network per shape, made when first met
      └─ anything else                 ──► the original forward: a warning for each reason, all of
                                           them counted for `explain`

The module itself is not touched: its class, configuration, submodules and weights stay what they
are. The only change is the instance attribute ``forward``.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.adapters.diffusers.arguments import Given, Parameters, contiguous, fits
from stepfuse.engine.adapters.diffusers.called import Called, WritesToArgument
from stepfuse.engine.adapters.diffusers.listed import Listed
from stepfuse.engine.adapters.diffusers.obstacles import AROUND, ModuleState, not_now
from stepfuse.engine.adapters.diffusers.results import Conversion, conversion
from stepfuse.engine.compile.optimize import Optimized, WeightsChanged
from stepfuse.engine.compile.timetable import CAPACITY
from stepfuse.engine.compile.without_graph import WithoutGraph

_MOST_LISTED = 256  # timesteps that are announced together: the training schedule is not
_UNKNOWN = "a timestep that a table may not have, outside 0..4095 or while a graph is captured"


class Forward:
    """``module.forward(x, timestep, ...)`` through compiled networks where they give the same.

    Copies and pickles hold the module and the settings, and compile again when they are called.

    Args:
        hidden: what lay in ``__dict__`` in the place of this.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None, hidden: Any = None) -> None:
        self.module, self.dtype, self.hidden = module, dtype, hidden
        self.originals: Counter[str] = Counter()  # calls of the original, by reason
        self._parameters = Parameters(type(module).forward)
        self.listed = Listed()  # schedulers whose timesteps may come
        self._begin()

    def _begin(self) -> None:
        """Nothing is compiled."""
        self._state: ModuleState | None = None
        self._fast: Optimized | None = None
        self._announced: set[int] = set()
        self._return_dict: bool | None = None  # what networks are compiled with
        self._conversion: Conversion | str | None = "unknown"  # to the other kind of results
        self._said: set[str] = set()  # why networks are none
        self._written: set[str] = set()  # arguments that the forward writes to

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # by torch.compile, which wants the network itself
            return self._original(*args, **kwargs)
        given = self._parameters.given(args, kwargs)
        reason = given if isinstance(given, str) else self._obstacle(given)
        if reason is None:
            assert isinstance(given, Given)
            fast, x = self._optimized(), given.x.contiguous()
            t = self._timesteps(fast, x, given.timestep) if self._parameters.time else None
            if t is not None or not self._parameters.time:
                call = fast, (x,) if t is None else (x, t), contiguous(given.condition)
                try:
                    return self._results(call, given.return_dict, args, kwargs)
                except WritesToArgument as error:
                    self._written.add(error.argument)
                    reason = _writes_to(error.argument)
            else:
                reason = _UNKNOWN
        if fits(reason) and reason not in self.originals:
            self._warn(f"runs its own forward, not a compiled one: {reason}")
        self.originals[reason] += 1
        return self._original(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the original, which pipelines look up."""
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def refresh(self) -> None:
        """Read the weights again; changes that can be seen are read without this."""
        if self._fast is not None:
            self._fast.refresh()

    def forget(self) -> None:
        """Let go of what was compiled, and of every tensor of the module that it holds."""
        if self._fast is not None:
            self._begin()
            gc.collect()

    def explain(self) -> str:
        """What was compiled, and which calls ran the original and why."""
        lines = [self._fast.explain() if self._fast is not None else "nothing compiled yet"]
        for reason, count in self.originals.items():
            lines.append(f"original forward       {count} calls: {reason}")
        return "\n".join(lines)

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def _obstacle(self, given: Given) -> str | None:
        """Why the original must run this call, or None."""
        reason = not_now(self.module, given.x, given.condition)
        if reason is not None:
            return reason
        for name in given.condition.keys() & self._written:
            return _writes_to(name)
        if self._state is None or not self._state.holds():
            self._state = ModuleState(self.module)
        return self._state.reason

    def _optimized(self) -> Optimized:
        if self._fast is None:
            inner = Called(self.module, self._parameters)
            ignored = [f"model.module.{table}" for table in AROUND]
            self._fast = Optimized(inner, self.dtype, (), 8, ignored=ignored)
        return self._fast

    def _results(
        self,
        call: tuple[Optimized, tuple[Any, ...], dict[str, Any]],
        wanted: bool | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Of compiled networks, as a dict or a tuple as it is ``wanted``."""
        if wanted is None:
            return self._run(*call)
        if self._return_dict is None:
            self._return_dict = wanted
        if wanted is self._return_dict:
            return self._run(*call, return_dict=wanted)
        # what runs itself may count its calls: none is made beside the caller's
        alone = isinstance(call[0].networks[-1], WithoutGraph)
        if self._conversion == "unknown" and not alone:
            theirs = self._original(*args, **kwargs)
            self._conversion = conversion(self._run(*call, return_dict=not wanted), theirs)
        if self._conversion is None or isinstance(self._conversion, str):
            return self._run(*call, return_dict=wanted)
        return self._conversion(self._run(*call, return_dict=not wanted))

    def _run(
        self, fast: Optimized, args: tuple[Any, ...], condition: dict[str, Any], **options: Any
    ) -> Any:
        try:
            result = fast(*args, **condition, **options)
        except WeightsChanged:
            fast.refresh()
            result = fast(*args, **condition, **options)
        latest = fast.networks[-1]
        if isinstance(latest, WithoutGraph):
            why = latest.reports[0].note
            if why not in self._said:
                self._said.add(why)
                self._warn(
                    f"was not compiled as a whole, {why}; what can be is a forward of tensor "
                    "operations that writes to no attribute and reads no value back"
                )
        return result

    def _warn(self, what: str) -> None:
        warnings.warn(f"stepfuse: {type(self.module).__name__} {what}", stacklevel=4)

    def _timesteps(self, fast: Optimized, x: Tensor, timestep: Any) -> Any:
        """``timestep`` as compiled networks take it, its row in the table filled: [N] on the device
        of x where the model takes one for all samples.

        None where there is a table and nobody can say whether it has a row of this timestep.
        """
        per_sample = self._parameters.per_sample
        if not isinstance(timestep, Tensor):
            if not per_sample or isinstance(timestep, float):
                return timestep  # which tensor stands for it, if any, `Optimized` finds out
            timestep = torch.tensor(timestep, device="cpu")
        t, whole = timestep, not timestep.is_floating_point()
        if x.device.type != "cpu" and whole:
            if not self._have_rows(fast, t, x.device):
                return None
        elif whole and t.device.type == "cpu" and t.numel() and bool((t == t.reshape(-1)[0]).all()):
            value = int(t.reshape(-1)[0])
            if 0 <= value < CAPACITY:
                self._announce(fast, [value])
        if per_sample and t.numel() == 1 and t.dim() < 2:
            t = t.to(x.device).reshape(1).repeat(len(x))
        return t.long() if whole else t

    def _have_rows(self, fast: Optimized, t: Tensor, device: torch.device) -> bool:
        """Whether a ``device`` that reads t will find it in the table, or there is none.

        An entry of a scheduler's list is known, and announced with all of the list; any other that
        is on the device is read back, once there is a table.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        values = t.reshape(-1).tolist() if t.device.type == "cpu" else self.listed.values(t)
        if values is None:
            if not self._announced:
                return True
            if capturing:
                return False
            values = t.reshape(-1).tolist()
        if not all(0 <= value < CAPACITY for value in values):
            return not self._announced
        new = not self._announced.issuperset(values)
        if new and capturing:
            return not self._announced
        if new:
            listed = self.listed.beside(values, _MOST_LISTED)
            self._announce(fast, [*values, *(v for v in listed if 0 <= v < CAPACITY)])
        return True

    def _announce(self, fast: Optimized, values: Collection[int]) -> None:
        if not self._announced.issuperset(values):
            fast.prepare(values)
            self._announced.update(values)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("module", "dtype", "hidden", "originals", "listed", "_parameters")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _writes_to(argument: str) -> str:
    return f"forward writes to its argument {argument}, which a graph does not"
