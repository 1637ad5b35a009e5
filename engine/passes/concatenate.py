"""Concatenate images by their channels while they stay [N, H, W, C] in memory.

    cat([a, b], 1) ──► every pixel of a, then the same pixel of b

PyTorch's `cat` guesses the layout of its result from strides, and those of a single image that
came from tokens [1, H W, C] do not tell: the result may be [N, C, H, W], which every convolution
after it would have to turn. Copies bytes, so that any dtype will do. Exact. CPU only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from stepfuse.engine.passes.convolve import native
from stepfuse.engine.passes.graph import PassReport, aten, calls, finish, replace, stage, value
from stepfuse.kernels.layout import resolved
from stepfuse.kernels.registration import define, eager

if native is not None:
    from stepfuse.kernels.cpp.module import threads


def concatenate(gm: GraphModule) -> PassReport:
    """Replace every `cat` of channels-last images."""
    report = PassReport("concatenate")
    for node in calls(gm, aten.cat.default):
        if stage(node) == "main" and report.count(_problem(node)):
            with gm.graph.inserting_before(node):
                made = gm.graph.call_function(join, (node.args[0],))
            made.meta.update(val=node.meta["val"], stage="main")
            replace(node, made)
    finish(gm)
    return report


def _problem(node: Node) -> str:
    result, parts = value(node), node.all_input_nodes
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if native is None or result.device.type != "cpu":
        return "no C++ module for it"
    if result.dim() != 4 or dim not in (1, -3):
        return "not channels of images"
    layouts = [value(part).is_contiguous(memory_format=torch.channels_last) for part in parts]
    if not all(layouts) or not result.is_contiguous(memory_format=torch.channels_last):
        return "not channels-last"
    if any(value(part).dtype != result.dtype for part in parts):
        return "different dtypes"
    return ""


def _run(images: list[Tensor], out: Tensor | None = None) -> Tensor:
    whole = resolved(*images)
    parts = [image.contiguous(memory_format=torch.channels_last) for image in whole]
    first = parts[0]
    n, _, h, w = first.shape
    if any(p.dtype != first.dtype or p.shape[::2] != (n, h) or p.shape[3] != w for p in parts):
        given = ", ".join(f"{p.dtype} {list(p.shape)}" for p in parts)
        raise ValueError(f"images must be alike but for their channels; got {given}")
    channels = [part.shape[1] for part in parts]
    shape = (n, sum(channels), h, w)
    if out is None or out.shape != shape or out.dtype != first.dtype:
        out = torch.empty(shape, dtype=first.dtype, memory_format=torch.channels_last)
    size = first.element_size()
    rows = [(p.data_ptr(), c * size) for p, c in zip(parts, channels, strict=True)]
    native.concatenate(rows, out.data_ptr(), n * h * w, threads())
    return out


def _fake(images: list[Tensor]) -> Tensor:
    first = images[0]
    shape = (first.shape[0], sum(image.shape[1] for image in images), *first.shape[2:])
    return torch.empty(
        shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last
    )


# cat(images, 1) for channels-last images of one dtype and size
join = define("join(Tensor[] images) -> Tensor", lambda images: _run(images), _fake)


def join_eagerly(images: list[Tensor], out: Tensor | None = None) -> Tensor:
    """`join`, which skips the dispatcher where nobody watches it.

    ``out`` may hold the result: a tensor like it that shares no memory with the images.
    """
    if eager(*images):
        return _run(images, out)
    y: Tensor = join(images)
    return y
