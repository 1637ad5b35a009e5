"""3x3 convolution with 36 instead of 144 products for every 4x4 tile of the output.

    y = A^T [ (G w G^T) * (B^T d B) ] A         d: 6x6 tile of x, w: 3x3 filter, y: 4x4 tile

Winograd's F(4x4, 3x3) (Lavin and Gray 2016, section 4.1), "*" being a matrix product over channels
at each of the 36 frequencies. With tiles d written as vectors, B^T d B is one product with the
Kronecker square of B^T; the 36 products over channels are one grouped 1x1 convolution. Float32
only: rounding grows by about four (relative 3e-6 a layer), which bfloat16 could not afford.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

mkldnn = torch.ops.mkldnn
OUT, IN = 4, 6  # size of an output tile and of the input tile it needs
FREQUENCIES = IN * IN
ONES = IN + 1  # frequency (1, 1): A^T has ones there, so that it adds the same to a whole tile
_ROWS = 64  # tiles at a time: enough rows for a product, few enough for the cache

_B_T = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
_G = (
    torch.tensor(
        [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
        dtype=torch.float64,
    )
    / 24
)
_A_T = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float64,
)
_TO_FREQUENCIES = torch.kron(_B_T, _B_T).float()  # [36, 36]
_FROM_FREQUENCIES = torch.kron(_A_T, _A_T).float()  # [16, 36]


def filters(weight: Tensor) -> Tensor:
    """G w G^T for a weight [K, C, 3, 3]: [36 K, C, 1, 1], frequencies first, in float64."""
    g = _G.to(weight.device)
    transformed = torch.einsum("ai,bj,kcij->abkc", g, g, weight.double())
    return transformed.reshape(-1, weight.shape[1], 1, 1).to(weight.dtype)


def offsets(bias: Tensor) -> Tensor:
    """The bias [K] as a bias [36 K] of the frequencies."""
    placed = torch.zeros(FREQUENCIES, bias.shape[0], dtype=bias.dtype, device=bias.device)
    placed[ONES] = bias
    return placed.reshape(-1)


def packed_shape(x: torch.Size, channels: int) -> list[int]:
    """Shape of what the packed filters are applied to, for x [N, C, H, W]."""
    return [1, FREQUENCIES * channels, _chunk(x) * _tiles(x[2]) * _tiles(x[3]), 1]


def winograd(x: Tensor, packed: Tensor, bias: Tensor | None, channels_out: int) -> Tensor:
    """conv2d(x, w, b, padding=1) for float32 x [N, C, H, W], channels-last like its result.

    ``packed`` are the `filters` in oneDNN's order, ``bias`` the `offsets`. Tiles beyond the border
    are computed and cut off.
    """
    n, c, h, w = x.shape
    high, wide = _tiles(h), _tiles(w)
    right, below = wide * OUT - w, high * OUT - h
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + right, 1, 1 + below))
    s = padded.stride()
    out = x.new_empty((n, high * OUT, wide * OUT, channels_out))
    chunk = _chunk(x.shape)
    for start in range(0, n, chunk):
        m = min(chunk, n - start)
        tiles = padded[start : start + m].as_strided(
            (IN, IN, m, high, wide, c),
            (s[1], s[2], s[0], OUT * s[1], OUT * s[2], s[3]),
            padded.storage_offset() + start * s[0],
        )
        found = _product(tiles.reshape(FREQUENCIES, -1), packed, bias, c, channels_out)
        tiled = found.view(OUT, OUT, m, high, wide, channels_out).permute(2, 3, 0, 4, 1, 5)
        out[start : start + m].view(m, high, OUT, wide, OUT, channels_out).copy_(tiled)
    if right or below:
        out = out[:, :h, :w].contiguous()
    return out.permute(0, 3, 1, 2)


def _product(tiles: Tensor, packed: Tensor, bias: Tensor | None, c: int, k: int) -> Tensor:
    """Tiles of x [36, T C] to tiles of y [16, T K]."""
    linear = mkldnn._linear_pointwise.default
    plain: tuple[Any, ...] = (None, "none", [], "")
    d = linear(_TO_FREQUENCIES, tiles.t(), *plain)
    d = d.view(FREQUENCIES, -1, c).transpose(0, 1).reshape(1, -1, 1, FREQUENCIES * c)
    y = mkldnn._convolution_pointwise.default(
        d.permute(0, 3, 1, 2), packed, bias, [0, 0], [1, 1], [1, 1], FREQUENCIES, "none", [], ""
    )
    y = y.permute(0, 2, 3, 1).reshape(-1, FREQUENCIES, k).transpose(0, 1)
    result: Tensor = linear(_FROM_FREQUENCIES, y.reshape(FREQUENCIES, -1).t(), *plain)
    return result


def _tiles(size: int) -> int:
    return -(-size // OUT)


def _chunk(shape: torch.Size) -> int:
    """Samples at a time."""
    n, _, h, w = shape
    return max(1, min(n, _ROWS // (_tiles(h) * _tiles(w))))
