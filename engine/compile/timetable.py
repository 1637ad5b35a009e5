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
CAPACITY = 4096  # timesteps 0 .. 4095


class TimeTable:
    """Rows of ``compute(t)``, t [N], filled for the timesteps that were announced.

        row = rows[t];    (e_1, ..., e_k) = split(table[row])

    Both gathers run on the device and read nothing on the host, so that a recorded step works for
    every announced timestep. A timestep that was not announced has no row: on the CPU the gather
    raises IndexError, on CUDA it reads a row of NaN, whatever number it is.

    On the CPU the table never moves: a page of it that was never written takes no memory. Where
    every byte that is asked for is taken, it has the announced rows, and ``grows`` to at least
    twice as many when more come: into another tensor, ``moves`` counting how often. A step that was
    recorded before goes on reading the old one, where the timesteps announced since have no row.

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
        self.grows = self.device.type != "cpu"
        self.table: Tensor | None = None
        self.rows: Tensor | None = None
        self.filled: dict[int, int] = {}
        self.differs = False
        self.moves = 0

    def prepare(self, timesteps: Iterable[int]) -> None:
        """Fill the rows of these timesteps; those already filled are left alone.

        Raises ValueError for a timestep outside 0 .. CAPACITY - 1.
        """
        wanted = [int(t) for t in timesteps]
        wrong = [t for t in wanted if not 0 <= t < CAPACITY]
        if wrong:
            raise ValueError(f"timesteps must be in 0..{CAPACITY - 1}; got {wrong[0]}")
        new = [t for t in dict.fromkeys(wanted) if t not in self.filled]
        count = len(self.filled) + len(new)
        for t in new:
            if not self.differs and self._fill(t, len(self.filled), count):
                self.filled[t] = len(self.filled)

    def refill(self) -> None:
        """Compute every row again, in place: the weights have changed."""
        for row, t in enumerate(list(self.filled)):
            if not self._fill(t, row, len(self.filled)):
                return

    def lookup(self, t: Tensor) -> tuple[Tensor, ...]:
        """(e_1, ..., e_k) for t int [N], every entry announced before."""
        assert self.table is not None
        assert self.rows is not None
        if self.grows:  # nobody refuses another timestep here
            t = (t + 1).clamp_(0, CAPACITY + 1)
        found = self.table.index_select(0, self.rows.index_select(0, t))
        parts = found.split_with_sizes(self.widths, 1)
        if self.plain:
            return tuple(parts)
        return tuple(p.reshape(-1, *s) for p, s in zip(parts, self.shapes, strict=True))

    def nbytes(self) -> int:
        """Bytes of memory that the table takes: of the rows that were written, or of all it has."""
        if self.table is None or self.rows is None:
            return 0
        if self.grows:
            return self.table.nbytes + self.rows.nbytes
        return len(self.filled) * self.table[0].nbytes

    def _fill(self, t: int, row: int, count: int) -> bool:
        """Write row ``row`` of what will be ``count``; False where samples have different ones."""
        results = self.compute(torch.full((self.count,), t, dtype=self.dtype, device=self.device))
        if any(_rows_differ(result) for result in results):
            self.moves += self.table is not None
            self.differs, self.table, self.rows = True, None, None
            self.filled.clear()
            return False
        line = torch.cat([r[0].reshape(-1) for r in results])
        self._make_room(count, line)
        assert self.table is not None
        assert self.rows is not None
        if self.grows:  # the first row is of NaN, the first and last entry of what has none
            row, t = row + 1, t + 1
        self.table[row].copy_(line)
        self.rows[t] = row
        return True

    def _make_room(self, count: int, line: Tensor) -> None:
        """Let there be a table, of rows like ``line``, in which ``count`` of them have room."""
        old, rows = self.table, self.rows
        if old is not None and rows is not None and (not self.grows or count < len(old)):
            return
        most = CAPACITY
        if self.grows:
            most = min(count if old is None else max(count, 2 * (len(old) - 1)), CAPACITY) + 1
        table = torch.empty(most, line.numel(), dtype=line.dtype, device=self.device)
        if old is not None and rows is not None:
            table[: len(old)].copy_(old)
            # a step that reads the old table must not find rows in it that it has not
            self.table, self.rows = table, rows.clone()
            self.moves += 1
            return
        if self.grows:
            table[0].fill_(float("nan"))
        entries, absent = (CAPACITY + 2, 0) if self.grows else (CAPACITY, CAPACITY)  # no such row
        self.table, self.rows = table, torch.full((entries,), absent, device=self.device)


def _rows_differ(result: Tensor) -> bool:
    """By more than sums that are taken in another order in another row."""
    if len(result) == 1 or isinstance(result, FakeTensor):
        return False
    scale = result[0].abs().max()
    return bool((result - result[:1]).abs().max() > _SAME.get(result.dtype, 1e-2) * scale)
