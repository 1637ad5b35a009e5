"""How group_norm_silu cuts a tensor into tiles: plain Python, decided by the shape alone.

A tile is [pixels, channels], whichever of the two is contiguous. Where whole groups fit into one
tile, one program reads, normalises and writes them (one pass). Where they do not, the statistics of
tiles are written as partials and combined by every program of a second pass.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torch import Tensor

from stepfuse.kernels.triton.flat import OPTIONS, is_channels_last

# elements of a tile, as float32 in registers: 32 each of 256 or 512 threads ...
ONE_PASS, SPLIT = 16384, 8192
# ... or 64 where a tile is so narrow that its per-channel numbers take few registers beside them
NARROW = 16
# a program of the second pass reads the partials of its groups: few against its tile
PARTIALS = 256
# ... and twice that where the first pass would leave a large card idle (a B200 has 148 processors)
PROGRAMS = 512
VECTOR = 8  # 16-bit elements of a 128-bit access
RUNS = (32, 16)  # channels side by side that fill two 32-byte sectors, or one


@dataclass(frozen=True)
class Plan:
    """Sizes in elements; the upper-case names are constants of the compiled kernel."""

    last: bool  # channels-last
    samples: int
    channels: int
    pixels: int
    groups: int
    group: int  # channels of a group
    block: int  # channels of a tile: some groups, or a part of one
    cols: int  # ... rounded up to a power of two
    rows: int  # pixels of a tile, a power of two
    channel_parts: int  # tiles across one group; 1 where a tile holds whole groups
    tiles: int  # tiles down the pixels
    tiles_per_part: int  # of the statistics pass
    warps: int

    @property
    def one_pass(self) -> bool:
        """True where every group lies inside one tile."""
        return self.channel_parts == 1 and self.tiles == 1

    @property
    def blocks(self) -> int:
        """Tiles across the channels."""
        if self.channel_parts > 1:
            return self.groups * self.channel_parts
        return -(-self.channels // self.block)

    @property
    def held(self) -> int:
        """Groups of a tile, rounded up to a power of two."""
        return 1 if self.channel_parts > 1 else ceil_power(-(-self.block // self.group))

    @property
    def pixel_parts(self) -> int:
        """Programs of the statistics pass down the pixels."""
        return -(-self.tiles // self.tiles_per_part)

    @property
    def parts(self) -> int:
        """Partials of one group."""
        return self.channel_parts * self.pixel_parts

    def constants(self) -> dict[str, int | bool]:
        """The constexpr arguments that every kernel takes."""
        # the shape is a constant too: offsets become immediates, so that the vectors of a tile
        # share an address register, and masks that mask nothing disappear
        return {
            "CHANNELS": self.channels,
            "PIXELS": self.pixels,
            "GROUPS": self.groups,
            "BLOCK": self.block,
            "COLS": self.cols,
            "ROWS": self.rows,
            "HELD": self.held,
            "CHANNEL_PARTS": self.channel_parts,
            "LAST": self.last,
        }

    def options(self) -> dict[str, int | bool]:
        """How to compile and launch: see `flat.OPTIONS`."""
        return {**OPTIONS, "num_warps": self.warps}


def ceil_power(n: int) -> int:
    """The power of two that holds n."""
    return 1 << max(n - 1, 0).bit_length()


def plan(x: Tensor, groups: int, limit: int = ONE_PASS) -> Plan:
    """The plan for dense x [N, C, ...]; ``limit`` is the largest tile of a single pass."""
    samples, channels = x.shape[:2]
    return plan_of(
        samples,
        channels,
        math.prod(x.shape[2:]),
        groups,
        is_channels_last(x),
        limit,
    )


@functools.cache
def plan_of(
    samples: int, channels: int, pixels: int, groups: int, last: bool, limit: int = ONE_PASS
) -> Plan:
    """The plan for a shape; one pixel is laid out channels-last either way."""
    last = last or pixels == 1
    group = channels // groups
    rows = ceil_power(pixels)
    block = _whole_groups(samples, channels, rows, group, last, limit)
    if block:
        cols = ceil_power(block)
        parts, tiles, per_part = 1, 1, 1
        warps = min(max(rows * cols // 1024, 1), 16)
    else:
        block, parts = _split(channels, rows, group, last)
        cols = ceil_power(block)
        rows = min(rows, max(SPLIT // cols, 1))
        tiles = -(-pixels // rows)
        held = 1 if parts > 1 else ceil_power(-(-block // group))
        blocks = groups * parts if parts > 1 else -(-channels // block)
        most = max(min(PARTIALS // held, PARTIALS // 4), 1)
        while samples * blocks * most < PROGRAMS * parts and held * most < 2 * PARTIALS:
            most *= 2
        per_part = -(-tiles // max(most // parts, 1))
        warps = min(max(rows * cols // 1024, 1), 8)
    return Plan(
        last, samples, channels, pixels, groups, group, block, cols, rows, parts, tiles, per_part,
        warps,
    )  # fmt: skip


def _whole_groups(
    samples: int, channels: int, rows: int, group: int, last: bool, limit: int
) -> int:
    """Channels of a tile that holds whole groups, all their pixels; 0 where none fits."""
    if last:
        unit = math.lcm(group, VECTOR)
        for run in RUNS:
            block = min(-(-run // unit) * unit, channels)
            if rows * ceil_power(block) <= limit:
                return block
        return 0
    if rows * ceil_power(group) > (2 * limit if ceil_power(group) <= NARROW else limit):
        return 0
    held, groups = 1, channels // group
    # small groups share a program while there are programs enough to fill the card
    while (
        rows * ceil_power(2 * held * group) <= 2048
        and 2 * held <= min(groups, 32)
        and samples * groups // (2 * held) >= 256
    ):
        held *= 2
    return held * group


def _split(channels: int, rows: int, group: int, last: bool) -> tuple[int, int]:
    """(channels of a tile, tiles across one group) where no group fits into a tile."""
    if last:
        unit = math.lcm(group, VECTOR)
        block = min(-(-RUNS[0] // unit) * unit, channels)
        if ceil_power(block) <= 128:
            return block, 1
        return 64, -(-group // 64)
    room = max(SPLIT // rows, 1)
    # a divisor of the group leaves no lane idle, unless it makes too many parts
    block = min(group & -group, room)
    if group // block > PARTIALS // 4:
        block = room
    return block, -(-group // block)
