"""The calls of one stage in words, a line each: the result, its kind, who wrote it, and the call.

main(x, t, linear_2)
  conv    [2, 6, 7, 9] float32   prepack_convolutions   mkldnn._convolution_pointwise(x, ...)
  ...
  return add_3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import pytree

_WIDEST = 44  # of a column; what is longer pushes the next aside


def graph_text(
    stage: str, nodes: Sequence[Node], inputs: Sequence[Node], results: Sequence[Any]
) -> str:
    """``nodes`` between what comes in and what is returned; weights have the names they have in
    the model.
    """
    rows = [_row(node) for node in nodes]
    widths = [min(_WIDEST, max(map(len, column))) for column in zip(*rows, strict=True)]
    lines = [
        "   ".join(f"{part:<{width}}" for part, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append(f"return {', '.join(map(_argument, results))}".rstrip())
    head = f"{stage}({', '.join(map(_argument, inputs))})"
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _row(node: Node) -> tuple[str, str, str, str]:
    arguments = [_argument(arg) for arg in node.args]
    arguments += [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    made_by = node.meta.get("made_by", "the model")
    kinds = ", ".join(_kind(leaf) for leaf in pytree.tree_leaves(node.meta.get("val")))
    return node.name, kinds, made_by, f"{_operator(node.target)}({', '.join(arguments)})"


def _operator(target: Any) -> str:
    """mkldnn._linear_pointwise.binary, say, or the name of a function."""
    if isinstance(target, torch_names.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _kind(leaf: Any) -> str:
    """[2, 3, 8, 8] bfloat16, say."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    text = f"{list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
    plain = leaf.dim() != 4 or leaf.is_contiguous()
    turned = not plain and leaf.is_contiguous(memory_format=torch.channels_last)
    return f"{text} channels_last" if turned else text


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return str(value.meta.get("weight", value.name))
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return f"a tensor {_kind(value)}" if isinstance(value, Tensor) else repr(value)
