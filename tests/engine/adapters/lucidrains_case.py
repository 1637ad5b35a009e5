"""Small diffusions of denoising-diffusion-pytorch, and their seeded results."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor, nn

# float32 in another order: 2e-6 was seen, and 3e-5 where eta = 1 is not rounded as they round it
NEAR = 1e-5


class Bump(nn.Module):
    """A network without convolutions: nonlinear in x, different at every t, with one weight."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self, outputs: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.out_dim = outputs
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        phase = (t % 7).to(x.dtype).view(-1, 1, 1, 1) / 7
        wide = torch.cat([x, x.flip(1)], dim=1)[:, : self.out_dim]
        return self.dropout(self.weight * torch.sin(2 * wide + phase) + 0.3 * wide)


def bump(**settings: Any) -> GaussianDiffusion:
    """A diffusion of 8x8 images in 60 timesteps around a `Bump`."""
    return GaussianDiffusion(Bump(), **{"image_size": 8, "timesteps": 60, **settings})


def unet(self_condition: bool = False, **settings: Any) -> GaussianDiffusion:
    """A diffusion of images around their U-Net, with attention of both kinds."""
    torch.manual_seed(3)
    network = Unet(8, dim_mults=(1, 2), self_condition=self_condition, attn_dim_head=4).eval()
    return GaussianDiffusion(network, **{"image_size": (8, 12), "timesteps": 12, **settings})


def seeded(call: Callable[[], Any]) -> tuple[Any, Tensor]:
    """The result from seed 5, and the generator's state afterwards."""
    torch.manual_seed(5)
    random.seed(5)  # their self-conditioning throws Python's coin
    result = call()
    return result, torch.get_rng_state()


def check_same(ours: tuple[Any, Tensor], theirs: tuple[Any, Tensor], near: float = NEAR) -> None:
    """Equal results, and as many random numbers drawn."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=near, atol=near)
    assert torch.equal(ours[1], theirs[1])
