"""A 1-dimensional convolution is a 2-dimensional one of an image of height 1.

    conv1d(x [N, C, T], w [K, C, k]) ──► conv2d(x [N, C, 1, T], w [K, C, 1, k]) [N, K, 1, T]

Attention blocks that work on [N, C, T] (OpenAI's) project with such convolutions. As images they
are seen by the passes that follow: channels-last, packing, residual sums. Views only; exact up to
the order of summation (float32: relative 1e-5).
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    finish,
    replace,
)

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ALONG_HEIGHT = {"stride": 1, "padding": 0, "dilation": 1}


def widen_conv1d(gm: GraphModule, context: PassContext) -> PassReport:
    """Rewrite every conv1d."""
    report = PassReport("widen_conv1d")
    for node in calls(gm, aten.conv1d.default):
        report.count()
        _rewrite(gm, node)
    finish(gm)
    return report


def _rewrite(gm: GraphModule, node: Node) -> None:
    given: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False))
    given.update(node.kwargs)
    geometry = [[one, _last(given.get(name, one))] for name, one in _ALONG_HEIGHT.items()]
    with gm.graph.inserting_before(node):
        image, weight = (
            call(gm.graph, aten.unsqueeze.default, given[name], 2) for name in ("input", "weight")
        )
        wide = call(
            gm.graph,
            aten.conv2d.default,
            *(image, weight, given.get("bias"), *geometry, given.get("groups", 1)),
        )
        narrow = call(gm.graph, aten.squeeze.dim, wide, 2)
    replace(node, narrow)


def _last(v: Any) -> int:
    return int(v[-1] if isinstance(v, (list, tuple)) else v)
