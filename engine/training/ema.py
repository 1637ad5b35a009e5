"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepfuse.kernels import torch_names


class EMA:
    """shadow <- d shadow + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)).

    Without ``warm_up`` d is decay from the start.

    n counts the updates made before. The warm-up lets the average forget the random start in short
    runs; DDPM (section 4) uses decay 0.9999 at full length. Parameters are averaged, in float32.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warm_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay!r}; accepted: in [0, 1)")
        self.decay, self.warm_up = decay, warm_up
        self.updates = 0
        self.shadow = {name: p.detach().clone().float() for name, p in model.named_parameters()}

    def current_decay(self) -> float:
        """d of the next update."""
        if not self.warm_up:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one optimiser step."""
        weights = [p.detach().float() for _, p in model.named_parameters()]
        torch_names.foreach_lerp_(list(self.shadow.values()), weights, 1 - self.current_decay())
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of ``model`` by the averages."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """The averages and the number of updates."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        """Take over what ``state_dict`` gave."""
        updates, shadow = state["updates"], state["shadow"]
        if not isinstance(updates, int) or not isinstance(shadow, dict):
            raise ValueError(f"not the state of an EMA: keys {sorted(state)}")
        if shadow.keys() != self.shadow.keys():
            raise ValueError("the EMA state belongs to a network of another configuration")
        self.updates = updates
        for name, tensor in shadow.items():
            self.shadow[name].copy_(tensor)
