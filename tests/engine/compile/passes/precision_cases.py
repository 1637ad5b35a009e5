"""Small modules in which one operator meets what a lowered layer made, a table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Tensor, ...]]
_C = 16  # whole vectors of channels on every instruction set
IMAGE, LINE, VOLUME = (2, _C, 6, 4), (2, _C, 12), (2, _C, 4, 6, 2)
_LAYERS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Between(nn.Module):
    """layer(x), an operator on it and on the float32 input, and a layer that reads the result."""

    def __init__(self, rank: int, operator: Callable[..., Tensor], *held: nn.Module) -> None:
        super().__init__()
        layer = _LAYERS[rank]
        self.first, self.second = (layer(_C, _C, 3, padding=1) for _ in range(2))
        self.last = layer(_C, _C, 1)
        self.held = nn.ModuleList(held)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        y = self.operator(self.first(x), self.second(x), x, *self.held)
        ends = y.dim() == x.dim() and y.shape[1] == _C and y.is_floating_point()
        out: Tensor = self.last(y) if ends else y
        return out


class Attending(nn.Module):
    """Attention of one head whose q, k and v are dense, as VAEs and Stable Diffusion have it."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(_C, _C) for _ in range(3))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (
            layer(x).view(n, length, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(n, length, _C)


class Rotated(nn.Module):
    """Pairs of channels as complex numbers, as rotary embeddings are written."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(_C, _C), nn.Linear(_C, _C)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (
            torch.view_as_complex(layer(x).unflatten(-1, (-1, 2))) for layer in (self.q, self.k)
        )
        return torch.view_as_real(q * k).flatten(-2)


class Multihead(nn.Module):
    """PyTorch's own attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(_C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def _scattered(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return a.index_put((torch.tensor([1]),), x[:1])


def _spectrum(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(a) * torch.fft.rfft2(x), s=a.shape[2:])


def _sampled(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    grid = b[:, :2].permute(0, 2, 3, 1).tanh()
    return F.grid_sample(a, grid, align_corners=False)


def _looked_up(a: Tensor, b: Tensor, x: Tensor, table: nn.Module) -> Tensor:
    found: Tensor = table(a.argmax(1)).permute(0, 3, 1, 2)
    return found + a


def _condition(a: Tensor) -> Tensor:
    return torch.arange(a.shape[-1]) % 2 == 0


# on images: what the first and the second layer made, and the input
_IMAGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add": lambda a, b, x: a + x,
    "add out of two layers": lambda a, b, x: a + b,
    "addcmul": lambda a, b, x: torch.addcmul(x, a, b, value=0.5),
    "addcdiv": lambda a, b, x: torch.addcdiv(x, a, b.abs() + 1, value=0.5),
    "avg_pool2d": lambda a, b, x: F.avg_pool2d(a, 2),
    "adaptive_avg_pool2d": lambda a, b, x: F.adaptive_avg_pool2d(a, (3, 2)),
    "max_pool2d": lambda a, b, x: F.max_pool2d(a, 2),
    "adaptive_max_pool2d": lambda a, b, x: F.adaptive_max_pool2d(a, (2, 2)),
    "lp_pool2d": lambda a, b, x: F.lp_pool2d(a.abs() + 1, 2.0, 2),
    "lerp": lambda a, b, x: torch.lerp(a, x, 0.3),
    "lerp by a tensor": lambda a, b, x: torch.lerp(x, b, a.sigmoid()),
    "lerp by a number": lambda a, b, x: torch.lerp(a, b, torch.tensor(0.3)),
    "where": lambda a, b, x: torch.where(x > 0, a, x),
    "where and a number": lambda a, b, x: torch.where(_condition(a), a, torch.tensor(0.5)),
    "masked_fill": lambda a, b, x: a.masked_fill(_condition(a), torch.tensor(2.0)),
    "masked_scatter": lambda a, b, x: a.masked_scatter(x > 0, x),
    "cat": lambda a, b, x: torch.cat([a, x], 1),
    "cat then read": lambda a, b, x: torch.cat([a[:, :8], x[:, 8:]], 1),
    "stack": lambda a, b, x: torch.stack([a, x]).sum(0),
    "maximum": lambda a, b, x: torch.maximum(a, x),
    "bilinear": lambda a, b, x: F.interpolate(a, scale_factor=2, mode="bilinear"),
    "antialiased": lambda a, b, x: F.interpolate(a, size=(3, 2), mode="bilinear", antialias=True),
    "nearest": lambda a, b, x: F.interpolate(a, scale_factor=2, mode="nearest"),
    "nearest-exact": lambda a, b, x: F.interpolate(a, scale_factor=1.5, mode="nearest-exact"),
    "bicubic": lambda a, b, x: F.interpolate(a, scale_factor=2, mode="bicubic"),
    "pad reflect": lambda a, b, x: F.pad(a, (1, 1, 1, 1), mode="reflect"),
    "pad replicate": lambda a, b, x: F.pad(a, (1, 1, 1, 1), mode="replicate"),
    "pad circular": lambda a, b, x: F.pad(a, (1, 1, 1, 1), mode="circular"),
    "grid_sample": _sampled,
    "grid_sample where the input says": lambda a, b, x: F.grid_sample(
        a, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=True
    ),
    "cumsum": lambda a, b, x: a.cumsum(2),
    "cumprod": lambda a, b, x: (1 + 0.1 * a).cumprod(2),
    "logcumsumexp": lambda a, b, x: a.logcumsumexp(2),
    "softmax": lambda a, b, x: a.softmax(1),
    "log_softmax": lambda a, b, x: a.log_softmax(1),
    "gelu": lambda a, b, x: F.gelu(a),
    "gelu tanh": lambda a, b, x: F.gelu(a, approximate="tanh"),
    "glu": lambda a, b, x: F.glu(torch.cat([a, b], 1), 1),
    "mish": lambda a, b, x: F.mish(a) + F.hardswish(b) + F.softplus(a),
    "erf": lambda a, b, x: torch.erf(a) + torch.erfinv(b.tanh() * 0.9) + torch.special.i0(a),
    "norms": lambda a, b, x: a / (a.norm(dim=1, keepdim=True) + 1),
    "normalize": lambda a, b, x: F.normalize(a, dim=1),
    "cdist": lambda a, b, x: torch.cdist(a.flatten(2), x.flatten(2)),
    "std": lambda a, b, x: (a - a.mean(1, True)) / (a.std(1, keepdim=True) + 1),
    "median": lambda a, b, x: a - a.median(2, keepdim=True).values,
    "quantile": lambda a, b, x: a - a.quantile(0.5, dim=1, keepdim=True),
    "sort": lambda a, b, x: a.sort(2).values,
    "topk": lambda a, b, x: a.topk(2, dim=2).values,
    "index_select": lambda a, b, x: a.index_select(1, torch.arange(_C).flip(0)),
    "gather": lambda a, b, x: a.gather(2, torch.zeros(2, _C, 6, 4, dtype=torch.int64)),
    "index": lambda a, b, x: a[:, torch.arange(_C).flip(0)],
    "index_put": _scattered,
    "index_add": lambda a, b, x: a.index_add(1, torch.arange(_C), x),
    "index_copy": lambda a, b, x: a.index_copy(1, torch.arange(_C).flip(0), x),
    "scatter_add": lambda a, b, x: a.scatter_add(2, torch.zeros(2, _C, 6, 4, dtype=torch.int64), x),
    "slice_scatter": lambda a, b, x: torch.slice_scatter(a, x[:, :4], 1, 0, 4),
    "pixel_shuffle": lambda a, b, x: F.pixel_unshuffle(F.pixel_shuffle(a, 2), 2),
    "unfold": lambda a, b, x: F.fold(F.unfold(a, 2), (6, 4), 2),
    "einsum": lambda a, b, x: torch.einsum("nchw,ndhw->ncd", a, x),
    "matmul": lambda a, b, x: a @ x.transpose(2, 3),
    "bmm": lambda a, b, x: torch.bmm(a.flatten(2), b.flatten(2).mT),
    "baddbmm": lambda a, b, x: torch.baddbmm(torch.zeros(2, _C, _C), a.flatten(2), x.flatten(2).mT),
    "fft": _spectrum,
    "inverse": lambda a, b, x: torch.linalg.inv(a[:, :, :4] * 0.1 + torch.eye(4)),
    "bits": lambda a, b, x: a.view(torch.int32).bitwise_and(-65536).view(torch.float32),
    "random": lambda a, b, x: a + 0 * torch.rand_like(a),
    "sinc": lambda a, b, x: torch.sinc(a) + torch.atan2(a, x) + torch.hypot(a, b),
    "remainder": lambda a, b, x: torch.copysign(a, x) + torch.xlogy(x.abs(), b.abs() + 1),
    "bucketize": lambda a, b, x: a * 1 + torch.bucketize(x, torch.tensor([0.0, 0.5])),
    "local_response_norm": lambda a, b, x: F.local_response_norm(a, 3),
    "cosine": lambda a, b, x: F.cosine_similarity(a, x, dim=1).unsqueeze(1) * b,
    "cross": lambda a, b, x: torch.linalg.cross(a[:, :, :3], x[:, :, :3], dim=2),
    "polar": lambda a, b, x: torch.polar(a.abs(), x).abs(),
    "tensordot": lambda a, b, x: torch.tensordot(a, x, dims=([2, 3], [2, 3])),
}
_VOLUMES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "avg_pool3d": lambda a, b, x: F.avg_pool3d(a, 2),
    "adaptive_avg_pool3d": lambda a, b, x: F.adaptive_avg_pool3d(a, (2, 2, 1)),
    "max_pool3d": lambda a, b, x: F.max_pool3d(a, 2),
    "adaptive_max_pool3d": lambda a, b, x: F.adaptive_max_pool3d(a, (2, 2, 1)),
    "trilinear": lambda a, b, x: F.interpolate(a, scale_factor=2, mode="trilinear"),
    "nearest 3d": lambda a, b, x: F.interpolate(a, scale_factor=2, mode="nearest"),
    "pad replicate 3d": lambda a, b, x: F.pad(a, (1,) * 6, mode="replicate"),
    "pad reflect 3d": lambda a, b, x: F.pad(a, (1,) * 6, mode="reflect"),
    "grid_sample 3d": lambda a, b, x: F.grid_sample(
        a, x[:, :3].permute(0, 2, 3, 4, 1).tanh(), align_corners=False
    ),
}
_LINES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "conv1d": lambda a, b, x: a * b,
    "avg_pool1d": lambda a, b, x: F.avg_pool1d(a, 2),
    "max_pool1d": lambda a, b, x: F.max_pool1d(a, 2),
    "linear interpolation": lambda a, b, x: F.interpolate(a, scale_factor=2, mode="linear"),
    "pad reflect 1d": lambda a, b, x: F.pad(a, (1, 1), mode="reflect"),
}


def _one(a: Tensor, b: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    out: Tensor = module(a)
    return out


def _last(a: Tensor, b: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    out: Tensor = module(a.movedim(1, -1)).movedim(-1, 1)
    return out


def _two(a: Tensor, b: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    out: Tensor = module(a.flatten(2).mT, x.flatten(2).mT)
    return out


def _lstm(a: Tensor, b: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    out: Tensor = module(a.flatten(2).mT)[0]
    return out


# modules with parameters of their own, on images
_MODULES: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = {
    "layer_norm": (_last, lambda: nn.LayerNorm(_C)),
    "rms_norm": (_last, lambda: nn.RMSNorm(_C)),
    "group_norm": (_one, lambda: nn.GroupNorm(4, _C)),
    "batch_norm": (_one, lambda: nn.BatchNorm2d(_C)),
    "instance_norm": (_one, lambda: nn.InstanceNorm2d(_C, affine=True)),
    "prelu": (_one, lambda: nn.PReLU(_C)),
    "embedding": (_looked_up, lambda: nn.Embedding(_C, _C)),
    "bilinear layer": (_two, lambda: nn.Bilinear(_C, _C, 8)),
    "lstm": (_lstm, lambda: nn.LSTM(_C, 8, batch_first=True)),
    "depthwise": (_one, lambda: nn.Conv2d(_C, _C, 3, padding=1, groups=_C)),
    "groups": (_one, lambda: nn.Conv2d(_C, _C, 3, padding=1, groups=4)),
    "dilated": (_one, lambda: nn.Conv2d(_C, _C, 3, padding=2, dilation=2)),
    "same": (_one, lambda: nn.Conv2d(_C, _C, 4, padding="same")),
    "circular": (_one, lambda: nn.Conv2d(_C, _C, 3, padding=1, padding_mode="circular")),
    "transpose2d": (_one, lambda: nn.ConvTranspose2d(_C, _C, 4, 2, 1)),
    "transpose2d in groups": (_one, lambda: nn.ConvTranspose2d(_C, _C, 4, 2, 1, groups=4)),
    "linear": (_last, lambda: nn.Linear(_C, _C)),
}
_OTHER_RANKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "transpose1d": (3, lambda: nn.ConvTranspose1d(_C, _C, 4, 2, 1)),
    "same 1d": (3, lambda: nn.Conv1d(_C, _C, 4, padding="same")),
    "depthwise 1d": (3, lambda: nn.Conv1d(_C, _C, 3, padding=1, groups=_C)),
    "batch_norm 1d": (3, lambda: nn.BatchNorm1d(_C)),
    "transpose3d": (5, lambda: nn.ConvTranspose3d(_C, _C, 4, 2, 1)),
    "depthwise 3d": (5, lambda: nn.Conv3d(_C, _C, 3, padding=1, groups=_C)),
    "same 3d": (5, lambda: nn.Conv3d(_C, _C, 4, padding="same")),
    "group_norm 3d": (5, lambda: nn.GroupNorm(4, _C)),
    "batch_norm 3d": (5, lambda: nn.BatchNorm3d(_C)),
}
_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "one-head attention": lambda: Attending(1),
    "attention of two heads": lambda: Attending(2),
    "multihead attention": Multihead,
    "complex": Rotated,
    "transformer": lambda: nn.TransformerEncoderLayer(_C, 2, 32, batch_first=True),
}
_SHAPES = {3: LINE, 4: IMAGE, 5: VOLUME}
NAMES = [*_IMAGES, *_VOLUMES, *_LINES, *_MODULES, *_OTHER_RANKS, *_TOKENS]


def case(name: str) -> Case:
    """The module of this name in evaluation mode, with seeded weights, and its inputs."""
    torch.manual_seed(sum(name.encode()))
    module: nn.Module
    if name in _TOKENS:
        return _TOKENS[name]().eval(), (torch.randn(2, 8, _C),)
    if name in _MODULES:
        operator, make = _MODULES[name]
        module, rank = Between(4, operator, make()), 4
    elif name in _OTHER_RANKS:
        rank, make = _OTHER_RANKS[name]
        module = Between(rank, _one, make())
    else:
        for rank, table in ((4, _IMAGES), (5, _VOLUMES), (3, _LINES)):
            if name in table:
                module = Between(rank, table[name])
                break
        else:
            raise KeyError(name)
    return module.eval(), (torch.randn(_SHAPES[rank]),)
