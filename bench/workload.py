"""What every candidate of a benchmark is given: a network, a schedule, x_T and a condition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stepfuse.bench import peers_setup
from stepfuse.bench.diffusers_twin import diffusers_twin
from stepfuse.bench.networks import Plain, cifar10
from stepfuse.engine.networks.checkpoint import Checkpoint, load, models
from stepfuse.engine.networks.unet import UNet
from stepfuse.engine.sampling.plain_loop import METHODS
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.kernels.limits import check_seed, check_threads

DDPM_CIFAR = "ddpm-cifar"
Graph = Literal["auto", "step", "loop", "none"]


@dataclass(frozen=True)
class Spec:
    """What is to be run, in words and numbers, so that another process can build the same.

    Attributes are those of the command line; ``graph`` "none" is the sampler's None.
    """

    model: str = "digits"
    steps: int = 50
    method: str = "ddim"
    spacing: str = "leading"
    eta: float = 0.0
    seed: int = 0
    backend: str = "auto"
    graph: str = "auto"
    optimize: bool = True
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.graph not in get_args(Graph):
            accepted = ", ".join(get_args(Graph))
            raise ValueError(f"--graph must be one of {accepted}; got {self.graph!r}")
        check_threads("--threads", self.threads)
        check_seed("--seed", self.seed)


class Workload:
    """The network and the sampler's settings of a `Spec`.

    Attributes:
        network: eager, float32, as (x, t, **condition).
        schedule, prediction_type: what it was trained on.
        shape: (C, H, W) of an image.
        sampler_settings: keywords of `Sampler` that all candidates share.

    ``checkpoint`` is that of the spec's model where it has been loaded.

    Raises ValueError or TypeError for settings that no sampler accepts, ValueError for an unknown
    model, or where diffusers is needed for it and missing.
    """

    def __init__(self, spec: Spec, checkpoint: Checkpoint | None = None) -> None:
        if spec.method not in METHODS:
            raise ValueError(
                f"--method must be one of {', '.join(METHODS)}, whose loop is written plainly, "
                f"too; got {spec.method!r}"
            )
        self.spec = spec
        self.device = torch.device(spec.device)
        if spec.model == DDPM_CIFAR:
            self.network, self.shape, self.classes = _ddpm_cifar(), (3, 32, 32), None
            self.schedule, self.prediction_type = Schedule.linear(), "epsilon"
        else:
            checkpoint = checkpoint or _checkpoint(spec.model)
            self.network, self.shape = checkpoint.model, checkpoint.sample_shape
            self.schedule, self.prediction_type = checkpoint.schedule, checkpoint.prediction_type
            self.classes = checkpoint.num_classes
        self.network.to(self.device)
        learned = isinstance(self.network, UNet) and self.network.config.learned_variance
        self.learned_variance = learned
        self.sampler_settings = {
            "method": spec.method,
            "spacing": spec.spacing,
            "eta": spec.eta,
            "prediction_type": self.prediction_type,
            "variance_type": "learned_range" if learned else "fixed_small",
            # epsilon of the update stays as the network gave it, as diffusers has it
            "rederive_epsilon": False,
        }
        probe = self.sampler(self.network, steps=spec.steps, graph=self.graph)
        self.backend, self.timesteps = probe.backend, probe.timesteps

    @property
    def graph(self) -> str | None:
        """As `Sampler` takes it."""
        return None if self.spec.graph == "none" else self.spec.graph

    @property
    def parameters(self) -> int:
        """Weights of the network."""
        return sum(p.numel() for p in self.network.parameters())

    def sampler(self, model: Any, **more: Any) -> Sampler:
        """A sampler of ours over ``model`` with the settings of the workload."""
        more = {"backend": self.spec.backend, **more}
        return Sampler(model, self.schedule, **self.sampler_settings, **more)

    def x_T(self, batch: int) -> Tensor:
        """Where every loop starts: [N, C, H, W]."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        return torch.randn(batch, *self.shape, generator=generator).to(self.device)

    def condition(self, batch: int) -> dict[str, Tensor]:
        """Labels that take turns, where the network has classes."""
        if self.classes is None:
            return {}
        return {"labels": torch.arange(batch, device=self.device) % self.classes}

    def condition_in_words(self) -> str:
        return "" if self.classes is None else f"labels 0 .. {self.classes - 1} taking turns"

    def t(self, batch: int) -> Tensor:
        """An example of the timesteps of a batch, int64 [N]."""
        return torch.full((batch,), self.timesteps[0], device=self.device)

    def plain_twin(self, batch: int) -> nn.Module:
        """diffusers' network with the same weights as ``model(x, t)`` -> tensor."""
        condition = self.condition(batch)
        theirs = {"class_labels": condition["labels"]} if condition else {}
        return Plain(self.twin, theirs)

    @cached_property
    def twin(self) -> nn.Module:
        """diffusers' network with the same weights; the network itself where it is diffusers'."""
        if not isinstance(self.network, UNet):
            return self.network
        peers_setup.prepare()
        return diffusers_twin(self.network, self.shape[-1]).to(self.device)


def _checkpoint(name: str) -> Checkpoint:
    try:
        return load(name)
    except ValueError as error:
        if "unknown checkpoint" not in str(error):
            raise
        names = ", ".join([*models(), DDPM_CIFAR])
        raise ValueError(
            f"unknown --model {name!r}; accepted: {names}, or the path of a .safetensors file"
        ) from None


def _ddpm_cifar() -> nn.Module:
    """diffusers' U-Net in the size of DDPM's for CIFAR-10, with random weights."""
    try:
        peers_setup.prepare()
        return cifar10()
    except ImportError as error:
        raise ValueError(
            f"--model {DDPM_CIFAR} is a network of diffusers ({error}); "
            "pip install 'stepfuse[bench]'"
        ) from None
