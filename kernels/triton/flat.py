"""How the elementwise kernels walk a tensor of N samples, so that bulk accesses are 128 bit.

A program handles `BLOCK` neighbouring elements. Where the size of a sample is a multiple of 16, no
block crosses a sample: sample, coefficients and noise counters are scalars of the program.
Where it is not, a sample starts at an address that takes no wide access, so the blocks are cut from
the tensor as a whole and each element divides to find its sample. A tensor that needs no sample
number at all is one row, whatever its size. Channels-last tensors are walked in the order of their
memory; only the noise, whose counter follows C order, has to know.

Only the block at the end of a row is masked, because a mask that may end anywhere makes Triton fall
back to accesses of one element.
"""

# The types inside a kernel are those of Triton's compiler, and its decorator has none:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# fused multiply-adds are what the polynomials and the references' tolerances count on
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
ALIGNMENT = 16  # what Triton's specialisation of an integer argument promises


@dataclass(frozen=True)
class Grid:
    """How many programs walk the rows, and what they need to know to find their place."""

    rows: int  # 0: blocks cross samples; 1: all is one row; 2: rows of whole blocks
    length: int  # elements of a row: a sample, or the whole tensor
    total: int  # elements of the tensor
    blocks: int  # blocks of a row
    programs: int

    @classmethod
    def of(cls, x: Tensor, per_sample: bool) -> Grid:
        """The walk over dense ``x`` [N, ...], N >= 1."""
        total = x.numel()
        sample = total // x.shape[0]
        length = sample if per_sample or total > 2**31 - BLOCK else total
        if length > 2**31 - BLOCK:
            raise ValueError(f"the triton backend takes samples below 2^31 elements; got {length}")
        rows = 1 if length == total else 2 if length % ALIGNMENT == 0 else 0
        blocks = triton.cdiv(length, BLOCK)
        programs = total // length * blocks if rows else triton.cdiv(total, BLOCK)
        return cls(rows, length, total, blocks, programs)


@triton.jit
def place(length, total, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Where this program stands.

    Returns row (int64, number of the sample: [BLOCK] where ROWS is 0, a scalar elsewhere), first
    (int64, flat position of the block), start (its position in its row), limit (how many of its
    elements exist) and element (int32 [BLOCK], position of each element in its sample).
    """
    program = tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    if ROWS == 1:
        # apart from the next case because row * length would hide that blocks start aligned
        start = program * BLOCK
        row, first = start.to(tl.int64) * 0, start.to(tl.int64)
        limit, element = length - start, start + offset
    elif ROWS == 2:
        row = (program // blocks).to(tl.int64)
        start = (program % blocks) * BLOCK
        first = row * length + start
        limit, element = length - start, start + offset
    else:
        first = program.to(tl.int64) * BLOCK
        row = first // length
        start = (first - row * length).to(tl.int32)
        limit = tl.minimum(total - first, BLOCK).to(tl.int32)
        # lanes past the end stay at the last element: the row they look up must exist
        index = start + tl.minimum(offset, limit - 1)
        row, element = row + index // length, index % length
    return row, first, start, limit, element


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def is_channels_last(x: Tensor) -> bool:
    """True where the channels of [N, C, ...] stand innermost and C order is something else."""
    return not x.is_contiguous()
