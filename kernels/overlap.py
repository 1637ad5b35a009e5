"""Memory that an op writes: where outputs may lie, and which tensors share elements.

As PyTorch's own operators do, an op refuses an output whose elements share memory with each other,
with another output, or with an input, because the kernel would read what it has written. Only an
output that is an elementwise input, exactly, may be given: every element is then read before it is
written.

The test is exact for strided tensors too. Two of them share a byte where

    a + sum_k i_k s_k = b + sum_k j_k r_k        0 <= i_k < size_k, 0 <= j_k < size'_k

has a solution, with a, b the addresses, s, r the strides in bytes, and the bytes of an element as
one more dimension of stride 1. Addresses are compared, so that storages that share their memory
are found as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

_Range = tuple[int, int]  # addresses of the first byte and behind the last


def check_memory(
    written: Mapping[str, Tensor | None],
    elementwise: Mapping[str, Tensor | None],
    others: Sequence[Tensor | None] = (),
) -> None:
    """ValueError unless the outputs ``written`` can be written while the inputs are read.

    ``elementwise`` inputs may be an output exactly (address, shape, strides and dtype), ``others``
    may share no memory with one. An output must not be a negated view, whose memory does not hold
    its values.
    """
    inputs = [(name, x, _range(x)) for name, x in elementwise.items() if x is not None]
    rest = [(x, _range(x)) for x in others if x is not None]
    before: list[tuple[str, Tensor, _Range]] = []
    for name, out in written.items():
        if out is None:
            continue
        if out.is_neg():
            raise ValueError(f"{name} must not be a negated view; got one, {name}.is_neg()")
        if not out.is_contiguous() and overlaps_itself(out):
            raise ValueError(
                f"{name} must have memory of its own for every element; got shape "
                f"{tuple(out.shape)} with strides {out.stride()}"
            )
        first, end = place = _range(out)
        if not first and end:
            raise ValueError(f"{name} must have memory to write to; got a tensor of implied zeros")
        for other, x, (start, stop) in before:
            if first < stop and start < end and shares_memory(out, x):
                raise ValueError(f"{name} must not overlap {other} in memory")
        for other, x, (start, stop) in inputs:
            if x is out or first >= stop or start >= end:
                continue
            if not _same(out, x) and shares_memory(out, x):
                raise ValueError(
                    f"{name} must not overlap {other} in memory, unless it is that tensor with "
                    "its shape and strides"
                )
        for x, (start, stop) in rest:
            if first < stop and start < end and shares_memory(out, x):
                raise ValueError(
                    f"{name} must not overlap an input in memory; it does one of shape "
                    f"{tuple(x.shape)}"
                )
        before.append((name, out, place))


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether an element of a and an element of b share a byte."""
    (first, end), (start, stop) = _range(a), _range(b)
    if not a.numel() or not b.numel() or first >= stop or start >= end:
        return False
    if _dense(a) and _dense(b):
        return True
    # sum s i + sum r (last - j) = b + sum r last - a, so that all coefficients are positive
    second = _terms(b)
    total = start - first + sum(c * most for c, most in second)
    return _solvable([*_terms(a), *second], total)


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of x are the same memory."""
    dims = [(s, n - 1) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1 and x.numel() > 0]
    dims.sort()
    reach = 0
    for stride, most in dims:
        if stride <= reach:
            break
        reach += stride * most
    else:
        return False  # every dimension steps over all that the smaller ones reach
    if dims[0][0] == 0:
        return True
    # sum s m = 0 for some m between -most and most, one of which is positive: m_k here
    for k, (stride, most) in enumerate(dims):
        rest = [(s, 2 * n) for i, (s, n) in enumerate(dims) if i != k]
        total = sum(s * n for i, (s, n) in enumerate(dims) if i != k) - stride
        if _solvable([(stride, most - 1), *rest], total):
            return True
    return False


def _range(x: Tensor) -> _Range:
    first = x.data_ptr()
    if x.is_contiguous():
        return first, first + x.nbytes
    last = sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True))
    return first, first + (last + 1) * x.element_size() if x.numel() else first


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are one tensor in memory; the stride of a single element says nothing."""
    if a.data_ptr() != b.data_ptr() or a.shape != b.shape or a.dtype != b.dtype:
        return False
    places = zip(a.stride(), b.stride(), a.shape, strict=True)
    return all(s == r or n == 1 for s, r, n in places)


def _dense(x: Tensor) -> bool:
    """Whether x fills the addresses between its first and its last."""
    first, end = _range(x)
    return end - first == x.nbytes and not overlaps_itself(x)


def _terms(x: Tensor) -> list[tuple[int, int]]:
    """(stride in bytes, last index) of every dimension of x, and of the bytes of an element."""
    size = x.element_size()
    return [(s * size, n - 1) for s, n in zip(x.stride(), x.shape, strict=True)] + [(1, size - 1)]


def _solvable(terms: Sequence[tuple[int, int]], total: int) -> bool:
    """Whether sum_k c_k m_k = total for integers 0 <= m_k <= most_k; terms are (c_k, most_k)."""
    most_of: dict[int, int] = {}
    for coefficient, most in terms:
        if coefficient and most:
            most_of[coefficient] = most_of.get(coefficient, 0) + most
    merged = sorted(most_of.items(), reverse=True)
    reach, divisor = [0], [0]  # of the terms from k on
    for coefficient, most in reversed(merged):
        reach.insert(0, reach[0] + coefficient * most)
        divisor.insert(0, math.gcd(divisor[0], coefficient))
    failed: set[tuple[int, int]] = set()

    def search(k: int, left: int) -> bool:
        if left == 0:
            return True
        if not 0 < left <= reach[k] or left % divisor[k] or (k, left) in failed:
            return False
        coefficient, most = merged[k]
        least = max(0, -((reach[k + 1] - left) // coefficient))
        for factor in range(min(most, left // coefficient), least - 1, -1):
            if search(k + 1, left - factor * coefficient):
                return True
        failed.add((k, left))
        return False

    return search(0, total)
