"""The objective of Keras' DDIM example: epsilon at a continuous time, by its absolute error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepfuse.engine.networks.normalization import Normalization
from stepfuse.engine.networks.sampling_defaults import SamplingDefaults
from stepfuse.engine.sampling.schedule import keras_abar
from stepfuse.engine.training.data import ImageData
from stepfuse.kernels.add_noise import add_noise

SAMPLING = SamplingDefaults(steps=20, spacing="trailing")
_CHUNK = 1024  # images


@dataclass(frozen=True)
class KerasObjective:
    """mean |eps - eps_hat| over x_t = cos(theta) x + sin(theta) eps at times u in [0, 1].

    x is the image, normalised; theta = acos 0.95 + u (acos 0.02 - acos 0.95); the network is fed
    sin^2 theta.
    """

    normalization: Normalization

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        """u, uniform, [count]."""
        return torch.rand(count, generator=generator)

    def errors(
        self, model: nn.Module, x0: Tensor, noise: Tensor, u: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(of the noise, of the image): mean absolute errors per sample, [N] each.

        Args:
            x0: images in [-1, 1], noise: eps, [N, C, H, W].
            u: diffusion times [N].
        """
        x = self.normalization.encode((x0 + 1) / 2)
        abar = keras_abar(u)
        # a table with a row for each sample, in which sample n is at row n
        x_t = add_noise(x, noise, torch.arange(len(x), device=x.device), abar)
        assert isinstance(x_t, Tensor)
        output = model(x_t, (1 - abar).float(), labels).float()
        signal, sigma = (a.sqrt().float().view(-1, 1, 1, 1) for a in (abar, 1 - abar))
        image = (x_t - sigma * output.detach()) / signal
        return _mean_error(output, noise), _mean_error(image, x)


def _mean_error(found: Tensor, right: Tensor) -> Tensor:
    return (found - right).abs().flatten(1).mean(1)


def normalization_of(data: ImageData) -> Normalization:
    """Mean and standard deviation of every channel of the pixels in [0, 1].

    The sums are of whole numbers, so that a constant channel has no spread at all.

    Raises ValueError for such a channel.
    """
    images = data.images
    channels = images.shape[1]
    sums, squares = [0] * channels, [0] * channels
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK].to(torch.int64).transpose(0, 1).flatten(1)
        for channel in range(channels):
            sums[channel] += int(part[channel].sum())
            squares[channel] += int(part[channel].square().sum())
    count = images.numel() // channels
    white = 65535 if images.dtype == torch.uint16 else 255
    pairs = zip(sums, squares, strict=True)
    variances = [(count * square - total * total) / (count * white) ** 2 for total, square in pairs]
    return Normalization(
        tuple(total / (count * white) for total in sums),
        tuple(variance**0.5 for variance in variances),
    )
