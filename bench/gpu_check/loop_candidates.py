"""Whole sampling loops over one network: PyTorch written out, and our sampler in its modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.bench.gpu_check.network_candidates import without_graph
from stepfuse.engine.compile.optimize import Optimized, optimize
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import spaced_timesteps

Draw = Callable[[], Tensor]
PLAIN = "plain eager"
# names of our candidates: the graph that the sampler makes, and whether its network is compiled
OURS = {
    "sampler eager": (None, False),
    "optimized eager": (None, True),
    "optimized step": ("step", True),
    "optimized loop": ("loop", True),
}
CLIP = 1.0


@dataclass
class Subject:
    """A network with the settings of its loop, DDIM with eta 0.

    Args:
        model: computes in the dtype of its weights.
        condition: for a batch size, the keyword arguments of the model.
        shape: of one sample.
        lower: of `optimize`, the dtype of products; None for the model's own.
        own: the compiled network, made when it is asked for.
    """

    model: nn.Module
    schedule: Schedule
    prediction_type: Any
    shape: tuple[int, ...]
    steps: int
    device: torch.device
    condition: Callable[[int], dict[str, Tensor]]
    lower: torch.dtype | None = None
    own: Optimized | None = field(default=None, init=False)

    @property
    def timesteps(self) -> list[int]:
        """Descending."""
        return spaced_timesteps(self.schedule.num_train_timesteps, self.steps)

    def x_T(self, batch: int) -> Tensor:
        """float32 [batch, *shape], the same for every candidate."""
        generator = torch.Generator(self.device).manual_seed(3)
        return torch.randn((batch, *self.shape), generator=generator, device=self.device)

    def candidate(self, name: str, batch: int) -> Draw:
        """The loop of this name, run once; ValueError for one that is not known."""
        if name == PLAIN:
            draw = self._plain(batch)
        elif name in OURS:
            draw = self._ours(*OURS[name], batch)
        else:
            raise ValueError(f"name must be {PLAIN} or one of {', '.join(OURS)}; got {name!r}")
        draw()
        return draw

    def exact(self, batch: int) -> Tensor:
        """What the loop gives in float32."""
        wide = replace(self, model=copy.deepcopy(self.model).float(), lower=None)
        return wide._plain(batch)()

    def _plain(self, batch: int) -> Draw:
        """DDIM as one would write it: coefficients on the host, one operator after the other."""
        abar = self.schedule.alphas_cumprod.tolist()
        legs = list(zip(self.timesteps, [*self.timesteps[1:], None], strict=True))
        times = [torch.full((batch,), t, device=self.device) for t in self.timesteps]
        model = self.model if self.lower is None else copy.deepcopy(self.model).to(self.lower)
        dtype = next(model.parameters()).dtype
        x_T = self.x_T(batch)
        condition = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.condition(batch).items()
        }
        velocity = self.prediction_type == "v_prediction"
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                "prediction_type must be 'epsilon' or 'v_prediction' here; "
                f"got {self.prediction_type!r}"
            )

        def draw() -> Tensor:
            x = x_T
            for (t, s), time in zip(legs, times, strict=True):
                a, b = abar[t], 1.0 if s is None else abar[s]
                signal, sigma = a**0.5, (1 - a) ** 0.5
                out = model(x.to(dtype), time, **condition).float()
                x0 = signal * x - sigma * out if velocity else (x - sigma * out) / signal
                x0 = x0.clamp(-CLIP, CLIP)
                x = b**0.5 * x0 + (1 - b) ** 0.5 * ((x - signal * x0) / sigma)
            return x

        return draw

    def _ours(self, graph: Any, compiled: bool, batch: int) -> Draw:
        model = self._optimized(batch) if compiled else self.model
        sampler = Sampler(
            model,
            self.schedule,
            steps=self.steps,
            prediction_type=self.prediction_type,
            clip_sample=CLIP,
            graph=graph,
        )
        x_T, condition = self.x_T(batch), self.condition(batch)
        return lambda: sampler.sample(x_T.shape, condition=condition, x_T=x_T)

    def _optimized(self, batch: int) -> Optimized:
        """One compiled network for all modes: the graph is the sampler's own."""
        if self.own is None:
            dtype = next(self.model.parameters()).dtype
            time = torch.full((batch,), self.timesteps[0], device=self.device)
            example = (self.x_T(batch).to(dtype), time, self.condition(batch))
            model = copy.deepcopy(self.model)
            self.own = optimize(model, example, self.lower, **without_graph())
        return self.own
