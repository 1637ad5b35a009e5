"""Ways to evaluate the U-Net of `sd_unet`, each with a model of its own of the same weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepfuse.bench.gpu_check import sd_unet
from stepfuse.bench.gpu_check.check import Context
from stepfuse.bench.gpu_check.sd_unet import SDUNet
from stepfuse.bench.gpu_check.timing import captured
from stepfuse.engine.compile.optimize import Optimized, optimize

Evaluate = Callable[[], Tensor]  # the same memory may be given at every call
BASE = "eager NHWC graph"  # what every other is compared with
OURS = ("ours graph", "ours", "ours by default")
SIDE, TINY_SIDE = 64, 8


@dataclass
class Workload:
    """The network and its inputs, on one device, in one dtype and batch size.

    Attributes:
        own: the network compiled by us without a graph, made when it is first asked for; what is
            captured and what is not share it.
    """

    context: Context
    model: SDUNet
    x: Tensor
    t: Tensor
    text: Tensor
    own: Optimized | None = field(default=None, init=False)

    @classmethod
    def of(cls, context: Context, batch: int, dtype: torch.dtype) -> Workload:
        """The same for the same arguments, in whatever process."""
        shape = context.sized(sd_unet.Shape(), sd_unet.TINY)
        model = sd_unet.build(shape, context.device, dtype)
        return cls(context, model, *cls.inputs(context, shape, batch, dtype))

    def of_batch(self, batch: int) -> Workload:
        """With the same network."""
        inputs = self.inputs(self.context, self.model.shape, batch, self.x.dtype)
        return Workload(self.context, self.model, *inputs)

    @staticmethod
    def inputs(
        context: Context, shape: sd_unet.Shape, batch: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, t and the text."""
        side = context.sized(SIDE, TINY_SIDE)
        return sd_unet.inputs(shape, batch, side, context.device, dtype)

    def exact(self) -> Tensor:
        """The output in float32, without TF32 where that is off, by a copy of the network."""
        model = copy.deepcopy(self.model).float()
        out: Tensor = model(self.x.float(), self.t, self.text.float())
        return out.clone()

    def candidate(self, name: str) -> Evaluate:
        """The one of this name, run once.

        Raises ValueError for a name that is not known, and what building it raises.
        """
        words = name.split(" ", 1)
        makers: dict[str, Callable[[], Evaluate]] = {
            "eager": lambda: self._eager("NHWC" in name),
            "ours": lambda: self._ours(by_default=name.endswith("by default")),
            "compile": lambda: self._compiled(words[-1]),
        }
        if words[0] not in makers:
            raise ValueError(f"name must begin with {', '.join(makers)}; got {name!r}")
        evaluate = makers[words[0]]()
        if name.endswith(" graph"):
            evaluate = self._captured(evaluate)
        evaluate()
        return evaluate

    def _eager(self, last: bool) -> Evaluate:
        model, x = copy.deepcopy(self.model), self.x
        if last:
            model = model.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
        return lambda: model(x, self.t, self.text)

    def _ours(self, by_default: bool) -> Evaluate:
        """`optimize` without a graph of its own; by default, with what it makes by itself."""
        fast = self._optimize() if by_default else self.optimized()
        return lambda: fast(self.x, self.t, encoder_hidden_states=self.text)

    def optimized(self) -> Optimized:
        """`own`."""
        if self.own is None:
            self.own = self._optimize(**without_graph())
        return self.own

    def _optimize(self, **more: Any) -> Optimized:
        example = (self.x, self.t, {"encoder_hidden_states": self.text})
        timesteps = [int(self.t[0])]
        return optimize(copy.deepcopy(self.model), example, timesteps=timesteps, **more)

    def _compiled(self, mode: str) -> Evaluate:
        model = copy.deepcopy(self.model).to(memory_format=torch.channels_last)
        x = self.x.contiguous(memory_format=torch.channels_last)
        fast = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)
        return lambda: fast(x, self.t, self.text)

    def _captured(self, evaluate: Evaluate) -> Evaluate:
        results: dict[str, Tensor] = {}

        def run() -> None:
            results["out"] = evaluate()

        replay = captured(self.context, run)

        def replayed() -> Tensor:
            replay()
            return results["out"]

        return replayed


def makes_graphs() -> bool:
    """Whether `optimize` captures by itself."""
    return "graph" in inspect.signature(optimize).parameters


def without_graph() -> dict[str, Any]:
    """What tells `optimize` to capture nothing, where it would."""
    return {"graph": None} if makes_graphs() else {}
