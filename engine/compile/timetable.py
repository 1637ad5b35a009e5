"""The results of the timestep's own subgraph, one row per timestep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import torch
from torch import Tensor

from stepfuse.kernels.torch_names import FakeTensor

Compute = Callable[[Tensor], tuple[Tensor, ...]]
# sums in another order in another row differ by 1e-6 of the largest number, by 4e-3 in bfloat16
_SAME = {torch.float32: 1e-5, torch.float64: 1e-5}
CAPACITY = 4096  # timesteps 0 .. 4095; rows never written cost no memory


class TimeTable:
    """Rows of ``compute(t)``, t [N], filled for the timesteps that were announced.

        row = rows[t];    (e_1, ..., e_k) = split(table[row])

    Both gathers run on the device and read nothing on the host, so that a recorded step works for
    every announced timestep. A timestep that was not announced has no row: on the CPU the gather
    raises IndexError, on CUDA it reads a row of NaN.

    Samples of one timestep must have one row. Where they differ, as with labels the model holds in
    a buffer, there is no table: ``compute`` runs in every evaluation.
    """

    def __init__(self, compute: Compute, example: Tensor, shapes: list[torch.Size]) -> None:
        self.compute, self.count, self.device = compute, example.shape[0], example.device
        self.shapes = [tuple(shape[1:]) for shape in shapes]
        self.widths = [prod(shape) for shape in self.shapes]
        self.plain = all(len(shape) == 1 for shape in self.shapes)
        self.integral = not example.is_floating_point()
        self.dtype = example.dtype
        self.table: Tensor | None = None
        self.rows: Tensor | None = None
        self.filled: dict[int, int] = {}
        self.differs = False

    def prepare(self, timesteps: Iterable[int]) -> None:
        """Fill the rows of these timesteps; those already filled are left alone.

        Raises ValueError for a timestep outside 0 .. CAPACITY - 1.
        """
        wanted = [int(t) for t in timesteps]
        wrong = [t for t in wanted if not 0 <= t < CAPACITY]
        if wrong:
            raise ValueError(f"timesteps must be in 0..{CAPACITY - 1}; got {wrong[0]}")
        for t in dict.fromkeys(wanted):
            if t not in self.filled and not self.differs and self._fill(t, len(self.filled)):
                self.filled[t] = len(self.filled)

    def refill(self) -> None:
        """Compute every row again, in place: the weights have changed."""
        for t, row in list(self.filled.items()):
            self._fill(t, row)

    def lookup(self, t: Tensor) -> tuple[Tensor, ...]:
        """(e_1, ..., e_k) for t int [N], every entry announced before."""
        assert self.table is not None
        assert self.rows is not None
        found = self.table.index_select(0, self.rows.index_select(0, t))
        parts = found.split_with_sizes(self.widths, 1)
        if self.plain:
            return tuple(parts)
        return tuple(p.reshape(-1, *s) for p, s in zip(parts, self.shapes, strict=True))

    def nbytes(self) -> int:
        """Bytes of the rows that were written."""
        return 0 if self.table is None else len(self.filled) * self.table[0].nbytes

    def _fill(self, t: int, row: int) -> bool:
        results = self.compute(torch.full((self.count,), t, dtype=self.dtype, device=self.device))
        if any(_rows_differ(result) for result in results):
            self.differs, self.table, self.rows = True, None, None
            self.filled.clear()
            return False
        line = torch.cat([r[0].reshape(-1) for r in results])
        if self.table is None or self.rows is None:
            on_cpu = self.device.type == "cpu"
            height = CAPACITY if on_cpu else CAPACITY + 1  # with a row for timesteps without one
            self.table = torch.empty(height, line.numel(), dtype=line.dtype, device=self.device)
            if not on_cpu:
                self.table[-1].fill_(float("nan"))
            self.rows = torch.full((CAPACITY,), CAPACITY, device=self.device)
        self.table[row].copy_(line)
        self.rows[t] = row
        return True


def _rows_differ(result: Tensor) -> bool:
    """By more than sums that are taken in another order in another row."""
    if len(result) == 1 or isinstance(result, FakeTensor):
        return False
    scale = result[0].abs().max()
    return bool((result - result[:1]).abs().max() > _SAME.get(result.dtype, 1e-2) * scale)
