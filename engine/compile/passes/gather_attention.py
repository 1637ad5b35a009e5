"""Recognise attention that a network writes out itself.

    einsum("bct,bcs->bts", q s, k s) ──► softmax over s ──► einsum("bts,bcs->bct", ., v)
    sdpa(q^T, k^T, v^T, scale = s s)^T

and the same with matmul or bmm, whatever the order of the dimensions, scaled before or after the
product, cast to float32 for the softmax or not. Left to `attention` it then takes the form that is
fastest here; on CUDA it is PyTorch's fused operator. Exact up to the order of summation (float32:
relative 1e-5). A softmax of something else, a mask, or weights that are read elsewhere stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    SDPA,
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    constant,
    finish,
    is_call,
    is_tensor,
    only_user,
    replace,
    value,
)

_CASTS = (aten.to.dtype, aten._to_copy.default)
_MATMULS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class _Product:
    """A sum over the letters that ``out`` lacks, one letter for each dimension."""

    operands: tuple[Node, Node]
    letters: tuple[str, str]
    out: str


@dataclass(frozen=True)
class _Match:
    """Operands with the letters of their dimensions; ``batch``, t, s, c and d name them."""

    parts: tuple[tuple[Node, str], tuple[Node, str], tuple[Node, str]]
    batch: str
    t: str
    s: str
    c: str
    d: str
    out: str
    scale: float
    last: Node


def gather_attention(gm: GraphModule, context: PassContext) -> PassReport:
    """Replace products around a softmax by one operator."""
    report = PassReport("gather_attention")
    for softmax in calls(gm, aten.softmax.int):
        match = _match(softmax)
        if report.count("softmax of something else" if match is None else ""):
            assert match is not None
            _rewrite(gm, match)
    finish(gm)
    return report


def _match(softmax: Node) -> _Match | None:
    logits, scale = _unscaled(softmax.args[0])
    first = _product(logits)
    weights = _through_cast(softmax)
    last = only_user(weights)
    second = _product(last)
    if first is None or second is None or last is None or weights not in second.operands:
        return None
    (q, q_letters), (k, k_letters) = zip(first.operands, first.letters, strict=True)
    if first.out[_dim(softmax)] in q_letters:
        q, q_letters, k, k_letters = k, k_letters, q, q_letters
    q, q_scale = _unscaled(q)
    k, k_scale = _unscaled(k)
    at = second.operands.index(weights)
    # the second product says the same dimensions in letters of its own
    renamed = dict(zip(second.letters[at], first.out, strict=True))
    v, v_letters = second.operands[1 - at], second.letters[1 - at]
    extra = [letter for letter in v_letters if letter not in renamed]
    if len(extra) != 1:
        return None
    renamed[extra[0]] = "*"
    v_letters, out = ("".join(renamed[x] for x in text) for text in (v_letters, second.out))
    batch = "".join(x for x in first.out if x in q_letters and x in k_letters)
    t, s, c = (
        _one(found)
        for found in (
            set(first.out) - set(k_letters),
            set(first.out) - set(q_letters),
            set(q_letters) - set(first.out),
        )
    )
    parts = ((q, q_letters), (k, k_letters), (v, v_letters))
    wanted = (batch + t + c, batch + s + c, batch + s + "*", batch + t + "*")
    found_letters = (q_letters, k_letters, v_letters, out)
    complete = all(sorted(a) == sorted(b) for a, b in zip(wanted, found_letters, strict=True))
    if not (t and s and c and complete and len(batch) in (1, 2)):
        return None
    if first.out[_dim(softmax)] != s or any(value(n).dim() != len(x) for n, x in parts):
        return None
    return _Match(parts, batch, t, s, c, "*", out, scale * q_scale * k_scale, last)


def _product(node: object) -> _Product | None:
    if is_call(node, aten.einsum.default):
        assert isinstance(node, Node)
        equation, operands = node.args[:2]
        left, arrow, out = str(equation).replace(" ", "").partition("->")
        letters = left.split(",")
        if not arrow or "." in left or len(letters) != 2:
            return None
        return _Product(tuple(operands), (letters[0], letters[1]), out)  # type: ignore[arg-type]
    if is_call(node, *_MATMULS):
        assert isinstance(node, Node)
        a, b = node.all_input_nodes if len(node.all_input_nodes) == 2 else (node, node)
        batch = {3: "x", 4: "xy"}.get(value(a).dim())
        if batch is None or value(a).shape[:-2] != value(b).shape[:-2]:
            return None
        return _Product((a, b), (batch + "ij", batch + "jk"), batch + "ik")
    return None


def _unscaled(node: object) -> tuple[Node, float]:
    """Look through casts to float32 and products with a number, which is returned."""
    assert isinstance(node, Node)
    scale = 1.0
    while True:
        if is_call(node, *_CASTS):
            pass
        elif is_call(node, aten.mul.Tensor) and constant(node.args[1]) is not None:
            scale *= constant(node.args[1]) or 0.0
        elif is_call(node, aten.div.Tensor) and constant(node.args[1]):
            scale /= constant(node.args[1]) or 1.0
        else:
            return node, scale
        source = node.args[0]
        assert isinstance(source, Node)
        if not is_tensor(source) or not value(source).is_floating_point():
            return node, scale
        node = source


def _through_cast(node: Node) -> Node:
    user = only_user(node)
    return user if user is not None and is_call(user, *_CASTS) else node


def _dim(softmax: Node) -> int:
    dim = softmax.args[1]
    assert isinstance(dim, int)
    return dim


def _one(letters: set[str]) -> str:
    return next(iter(letters)) if len(letters) == 1 else ""


def _rewrite(gm: GraphModule, m: _Match) -> None:
    orders = (m.batch + m.t + m.c, m.batch + m.s + m.c, m.batch + m.s + m.d)
    with gm.graph.inserting_before(m.last):
        q, k, v = (
            _heads(gm, _permuted(gm, node, letters, order), m.batch)
            for (node, letters), order in zip(m.parts, orders, strict=True)
        )
        attended = call(gm.graph, SDPA, q, k, v, None, 0.0, False, scale=m.scale)
        if len(m.batch) == 1:
            attended = call(gm.graph, aten.squeeze.dim, attended, 1)
        result = _permuted(gm, attended, m.batch + m.t + m.d, m.out)
        if value(result).dtype != value(m.last).dtype:
            result = call(gm.graph, aten.to.dtype, result, value(m.last).dtype)
    replace(m.last, result)


def _heads(gm: GraphModule, node: Node, batch: str) -> Node:
    return call(gm.graph, aten.unsqueeze.default, node, 1) if len(batch) == 1 else node


def _permuted(gm: GraphModule, node: Node, letters: str, order: str) -> Node:
    if letters == order:
        return node
    return call(gm.graph, aten.permute.default, node, [letters.index(x) for x in order])
